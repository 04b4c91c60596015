"""Checkpoints that transformers 5 saved: exported and compared with transformers 4 installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import SourceError
from edgevlm.export import export_bundle
from edgevlm.export.components import Job
from edgevlm.export.pipeline import read
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.saved_by_5 import as_saved_by_5
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv
from tests.checkpoints.vocabulary import write_json
from tests.tinygptv_sources import SMALL

pytestmark = pytest.mark.usefixtures("children_inside")

LLAMA3: dict[str, Any] = {"vocabulary": "llama3", "kv_heads": 2, "text_config": {"rope_theta": 5e5}}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "paligemma-1": partial(write_paligemma, tokenizer="json"),
    "paligemma-2": partial(write_paligemma, version=2, tokenizer="both", layout="b"),
    "paligemma-rope": partial(
        write_paligemma, tokenizer="json", layout="c", text_config={"rope_theta": 3e4}
    ),
    "gemma3": partial(write_gemma3, layout="5", tokenizer="json"),
    "llava": partial(write_llava, layout="hf"),
    "llava-not-legacy": partial(write_llava, layout="hf-4.52", legacy=False),
    "llava-llama3": partial(write_llava, layout="hf", **LLAMA3),
    "llava-phi3": partial(write_llava, layout="hf-4.52", vocabulary="phi3"),
    "llava-tied": partial(write_llava, layout="hf", tied=True),
    "llava-5.0": partial(write_llava, layout="hf-5"),
    "internvl": partial(write_internvl, layout="hf"),
    "qwen2-vl": partial(write_qwen2_vl, nested=True, mrope="5"),
    "qwen2.5-vl": partial(write_qwen2_vl, new=True, nested=True, mrope="5", tied=False),
    "smolvlm": write_smolvlm,
}
STATED = {"image_mean": [0.3, 0.4, 0.5], "resample": 2}
# Models that resize with one filter alone.
ONE_FILTER = ("internvl", "qwen2-vl", "qwen2.5-vl", "smolvlm")


def prepared(folder: Path) -> Job:
    return read(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_it_is_exported_and_verified(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tmp_path / name)
    before = prepared(source).model
    mean = {"image_mean": STATED["image_mean"]}
    as_saved_by_5(source, **mean if name in ONE_FILTER else STATED)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    manifest = bundle.manifest
    assert all(stage.ok for stage in manifest.parity) and len(manifest.parity) >= 8
    assert manifest.image.mean == (0.3, 0.4, 0.5)
    assert name in ONE_FILTER or manifest.image.resample == "bilinear"
    assert (manifest.prompt, manifest.decoder) == (before.prompt, before.decoder)
    assert manifest.answer == before.answer
    assert "processor_config.json" in {record.file for record in manifest.source}


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_with_two_tables_keeps_both(tied: bool, tmp_path: Path) -> None:
    """Most classes of 5 say of the whole model that it is tied, whatever its decoder is."""
    source = write_llava(tmp_path / "source", layout="hf", layers=1)
    as_saved_by_5(config(source, tie_word_embeddings=tied))
    found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(source / "config.json", found | {"tie_word_embeddings": not tied})
    assert "lm_head.weight" in prepared(source).model.text.tensors()
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(stage.ok for stage in bundle.manifest.parity)


def test_only_the_processor_and_the_tokenizer_config_are_new(tmp_path: Path) -> None:
    """tokenizer.model beside a tokenizer_config.json of 5."""
    source = write_paligemma(tmp_path / "source")
    found = json.loads((source / "preprocessor_config.json").read_text(encoding="utf-8")) | STATED
    (source / "preprocessor_config.json").unlink()
    nested = {"processor_class": "PaliGemmaProcessor", "image_processor": found}
    write_json(source / "processor_config.json", nested)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = {"extra_special_tokens": ["<image>"]}
    write_json(source / "tokenizer_config.json", config | extra)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert bundle.manifest.image.mean == (0.3, 0.4, 0.5)


def config(source: Path, **changes: Any) -> Path:
    found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    found["text_config"] |= changes
    write_json(source / "config.json", found)
    return source


def test_rotary_positions_by_kind_of_layer(tmp_path: Path) -> None:
    source = as_saved_by_5(write_paligemma(tmp_path / "source", version=2, tokenizer="json"))
    one = {"rope_type": "default", "rope_theta": 2e4}
    config(source, rope_parameters={"full_attention": one, "sliding_attention": one})
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert prepared(source).model.text.rope_theta == 2e4
    other = {"full_attention": one, "sliding_attention": one | {"rope_theta": 1e6}}
    with pytest.raises(SourceError, match="rope_parameters differ by layer"):
        prepared(config(source, rope_parameters=other))


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "scales its positions ('linear')"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is known"),
    ],
)
def test_rotary_positions_that_llama_cpp_would_turn_otherwise(
    rope: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source = as_saved_by_5(write_llava(tmp_path / "source", layout="hf", layers=1))
    with pytest.raises(SourceError) as raised:
        prepared(config(source, rope_parameters={"rope_type": "default", "rope_theta": 1e4} | rope))
    assert says in str(raised.value)


def test_a_phi_of_tinygptv(tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", layout="split", tokenizer_kind="fast", **SMALL)
    for name, changes in (
        ("config.json", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}),
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}),
    ):
        path = source / "phi-2" / name
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in ("rope_theta", "partial_rotary_factor", "rope_scaling", "added_tokens_decoder"):
            found.pop(key, None)
        write_json(path, found | changes)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(stage.ok for stage in bundle.manifest.parity)


def test_rotary_positions_stated_twice(tmp_path: Path) -> None:
    """As transformers 4 saves what it read of 5's files."""
    source = as_saved_by_5(write_llava(tmp_path / "source", layout="hf", layers=1, **LLAMA3))
    with pytest.raises(SourceError, match="rope_theta is 10000.0, but 500000.0 in rope_parameters"):
        prepared(config(source, rope_theta=10000.0))
