"""Refusals of configs that a family cannot read, and the traceback of a bug in one."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm import family
from edgevlm.benchmarks.synthetic.models import MODELS
from edgevlm.errors import SourceError
from edgevlm.export import pipeline
from edgevlm.family import Source
from tests.checkpoints.paligemma import write_paligemma

CONFIG = "config.json"
RUN = {
    "model": {"arch": "minigpt_v2", "image_size": 448, "lora_alpha": 16},
    "datasets": {"a": {"vis_processor": {"train": {"image_size": 448, "mean": [0.5, 0.5, 0.5]}}}},
}
# Sections of a config.json that hold the decoder's, where it is not the whole of it.
DECODERS = ("text_config", "llm_config", "language_config")


def _more(source: Source) -> Source:
    """The source with the files and keys that its entry in MODELS leaves to defaults."""
    files: dict[str, Any] = {name: dict(found) for name, found in source.files.items()}
    config = files[CONFIG]
    inside = next((key for key in DECODERS if key in config), None)
    if inside is None and "config" not in config:  # Moondream2's, which states neither
        config |= {"eos_token_id": 2, "rope_theta": 10000.0}
    elif inside is not None:
        rope: dict[str, Any] = {"rope_type": "default"}
        rope["rope_theta"] = config[inside].get("rope_theta", 10000.0)
        if config["model_type"] == "gemma3":
            rope = {"full_attention": rope, "sliding_attention": dict(rope)}
        config[inside] = {**config[inside], "rope_parameters": rope}
    if source.origins:
        files |= {"stage/config.json": RUN, "bert/config.json": {"model_type": "bert"}}
        files["bert/config.json"]["num_attention_heads"] = 12
    files["generation_config.json"] = {"eos_token_id": 2}
    return replace(source, files=files)


SOURCES = {name: _more(source) for name, source in MODELS.items()}
# The name of a type or of nothing that is read; neither is ever described with another.
SKIPPED = {("config.json", "model_type")}
WRONG: tuple[object, ...] = (None, "wide", [], {}, [7], {"a": 1}, 7.5, -1, 0, True)


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(value, Mapping):
        for key in value:
            yield from _paths(value[key], (*path, key))


def _changed(source: Source, path: tuple[str, ...], value: Any) -> Source:
    files: Any = copy.deepcopy(dict(source.files))
    inside = files
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return replace(source, files=files)


def _describe(source: Source) -> family.Model:
    return family.by_config(source.files[CONFIG], "here").describe(source)


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_value_of_any_key_is_a_value_error(name: str) -> None:
    source = SOURCES[name]
    _describe(source)
    for path in _paths(source.files):
        if len(path) == 1 or path in SKIPPED:
            continue
        for value in WRONG:
            try:
                _describe(_changed(source, path, value))
            except ValueError as e:
                assert "\n" not in str(e)
            except Exception as e:
                raise AssertionError(f"{path} = {value!r}") from e


@pytest.mark.parametrize("name", SOURCES)
def test_a_size_of_the_wrong_type_names_its_key(name: str) -> None:
    source = SOURCES[name]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size", "image_size", "patch_size",
             "rope_theta", "lora_alpha", "mean", "text_config", "vision_config",
             "dim", "n_layers", "n_heads", "enc_dim", "enc_n_layers", "crop_size")  # fmt: skip
    found = [path for path in _paths(source.files) if path[-1] in sizes]
    if {*DECODERS} & {*source.files[CONFIG]}:  # then nobody reads the copies beside it
        found = [path for path in found if len(path) > 2 or path[-1].endswith("_config")]
    assert len(found) > 5
    for path in found:
        with pytest.raises(ValueError, match=path[-1]):
            _describe(_changed(source, path, "wide"))


@pytest.mark.parametrize("bug", [KeyError, TypeError, AttributeError, ZeroDivisionError])
def test_a_bug_in_a_family_shows_its_traceback(
    bug: type[Exception], paligemma_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(_: Source) -> family.Model:
        raise bug("here")

    broken = dataclasses.replace(family.by_name("paligemma", ""), describe=describe)
    monkeypatch.setattr(pipeline, "family_of", lambda _: broken)
    with pytest.raises(bug, match="here"):
        pipeline.read(paligemma_checkpoint)


def test_a_value_error_is_a_line_that_names_the_file(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["vision_config"]["patch_size"] = 0
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SourceError, match=r"config.json: vision_config.patch_size is 0; it must"):
        pipeline.read(folder)
