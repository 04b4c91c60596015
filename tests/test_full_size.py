"""Full-size checkpoints, at sizes of a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgevlm.benchmarks.synthetic.make import describe
from edgevlm.benchmarks.synthetic.models import MODELS
from edgevlm.export import pipeline
from edgevlm.export.checkpoint.source import CONFIG
from edgevlm.family import Source
from workshop import published

_LESS = {
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
_TILES = ("smolvlm-256m", "internvl3-1b", "llava-onevision-0.5b")


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {k: _small(v) for k, v in config.items() if k.endswith("_config")}
    return {**config, **{k: v for k, v in _LESS.items() if k in config}, **parts}


@pytest.mark.parametrize("name", _TILES)
def test_an_export_knows_every_tensor_and_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MODELS[name]
    files = {**whole.files, CONFIG: _small(whole.files[CONFIG])}
    small = Source(files, tokenizer=whole.tokenizer)
    monkeypatch.setattr(published, "MODELS", {name: small})
    assert not published.write(name, tmp_path / name)
    job = pipeline.read(tmp_path / name)
    assert job.model.decoder.n_vocab == _LESS["vocab_size"]
    assert job.model.image.tiles == describe(whole, name)[1].image.tiles
