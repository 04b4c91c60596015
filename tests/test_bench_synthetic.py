"""Bundles of random weights: whole, runnable, of the types that were asked for, made once."""

import numpy as np
import pytest
from gguf import GGUFReader

import edgevlm
from edgevlm.benchmarks.published import ROWS
from edgevlm.benchmarks.synthetic import make as synthetic
from edgevlm.benchmarks.synthetic.decoder import QUANTS
from edgevlm.benchmarks.synthetic.models import CONFIGS
from edgevlm.bundle import open_bundle
from edgevlm.family import Source, by_model_type

SMALL = {
    "model_type": "paligemma",
    "image_token_index": 900,
    "vision_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 56,
    },
}  # fmt: skip
TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_synthetic_bundle_answers(kind, quant, tmp_path):
    config = SMALL | {"text_config": TEXT | {"model_type": kind}}
    synthetic.make(tmp_path / "made", "synthetic-small", config, quant)
    bundle = open_bundle(tmp_path / "made", check="full")
    types = {t.name: t.tensor_type.name for t in GGUFReader(bundle.path("decoder")).tensors}
    assert {t for n, t in types.items() if n.endswith("ffn_up.weight")} == {QUANTS[quant][1]}
    assert types["token_embd.weight"] == QUANTS[quant][2]
    picture = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    with edgevlm.load(tmp_path / "made") as vlm:
        rows = vlm.embed_image(picture)
        assert rows.shape == (16, 256) and np.isfinite(rows).all() and rows.std() > 0
        assert np.isfinite(vlm.score("hello", ["a", "b"], picture)).all()
        assert vlm.ask("hello", picture, max_tokens=3).tokens.image == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_has_a_family_that_reads_its_config(name):
    config = CONFIGS[name]
    model = by_model_type(config["model_type"], name).describe(Source({"config.json": config}))
    assert (model.image.tokens, model.decoder.n_vocab) == (256, ROWS)


def test_a_synthetic_bundle_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    config = SMALL | {"text_config": TEXT | {"model_type": "gemma"}}
    monkeypatch.setattr(synthetic, "CONFIGS", {"small": config})
    started = []
    first = synthetic.synthetic("small", "q8_0", started.append)
    again = synthetic.synthetic("small", "q8_0", started.append)
    assert started == ["small-q8_0"] and first == again
    assert first.manifest.name == "synthetic-small-q8_0"
    assert first.folder == tmp_path / "synthetic" / "small-q8_0"
