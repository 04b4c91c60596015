"""Dual encoders from the layouts in which they are published, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import ExportError, SourceError
from edgevlm.export import export_bundle, inspect_source
from edgevlm.export.onnx import storage
from edgevlm.export.parity.metrics import distance
from edgevlm.image import preprocess
from edgevlm.texts import TextTokens
from tests.checkpoints.dual import (
    Tensors,
    clip_config,
    clip_model,
    write_clip,
    write_open_clip,
    write_open_clip_siglip,
    write_siglip,
)
from tests.checkpoints.vocabulary import write_json

Array = NDArray[Any]
Write = Callable[[Path], Path]

LAYOUTS: dict[str, Write] = {
    "clip": write_clip,
    "clip-old-tokenizer-bin-half": partial(
        write_clip, tokenizer="pair", weights="bin", dtype=torch.float16
    ),
    "clip-sharded-bfloat16": partial(write_clip, weights="sharded", dtype=torch.bfloat16),
    "open-clip": write_open_clip,
    "open-clip-custom-text": partial(write_open_clip, prefix="text.", weights="bin", quick=True),
    "siglip": write_siglip,
    "siglip2": partial(write_siglip, second=True),
    "siglip2-model": partial(write_siglip, second=True, tokenizer="model"),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = LAYOUTS[request.param](tmp_path_factory.mktemp("dual") / request.param)
    return export_bundle(folder, folder.with_name("bundle"), vision_precision="fp32")


def embedded(bundle: Bundle, role: str, given: Array) -> Array:
    name = "pixels" if role == "vision" else "ids"
    return storage.run(bundle.path(role), name, given)


def test_it_is_its_source(bundle: Bundle) -> None:
    parity = {s.stage: s.worst for s in bundle.manifest.parity}
    assert [*parity] == ["tokens", "score", "pixels", "vision", "text"]
    assert parity["tokens"] == parity["pixels"] == 0
    assert max(parity.values()) < 1e-6
    assert open_bundle(bundle.folder, "full").manifest == bundle.manifest
    assert [*bundle.manifest.components] == ["vision", "text"]


def test_rows_have_length_one(bundle: Bundle) -> None:
    spec, text = bundle.manifest.image, bundle.manifest.text
    assert text
    pixels = np.stack([preprocess(np.zeros((9, 5, 3), np.uint8), spec)] * 3)
    ids = TextTokens(bundle.folder / bundle.manifest.components["text"].files[-1].file, text)
    for role, given in (("vision", pixels), ("text", ids(["a", "", "two words"]))):
        rows = embedded(bundle, role, given)
        assert rows.shape == (3, text.width) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "precisions"),
    [("clip", ("int8", "qdq8", "fp32")), ("siglip2", ("fp16", "int8")), ("siglip", ("int4",))],
)
def test_every_precision_stays_within_its_bound(
    tmp_path: Path, layout: str, precisions: tuple[str, ...]
) -> None:
    folder = LAYOUTS[layout](tmp_path / "checkpoint")
    made = export_bundle(folder, tmp_path / "bundle", vision_precision=precisions)
    parity = {s.stage: s for s in made.manifest.parity}
    names = ["vision", *(f"vision {precision}" for precision in precisions[1:]), "text"]
    assert [*parity][3:] == names
    assert all(s.ok for s in parity.values())
    assert parity["vision"].worst > 1e-9  # something was rounded
    assert made.manifest.components["text"].precision == precisions[0]


def rows_of(folder: Path, out: Path, texts: list[str]) -> Array:
    made = export_bundle(folder, out, vision_precision="fp32", verify=False)
    assert made.manifest.text
    ids = TextTokens(made.folder / "text.tokenizer.json", made.manifest.text)
    return np.concatenate([embedded(made, "text", ids([text])) for text in texts])


TEXTS = ["A Dog", "ÉTÉ à la plage", "图片里有什么", "word " * 200, ""]


@pytest.mark.parametrize(
    "text",
    [
        {"eos_token_id": 2},  # the largest id
        {"eos_token_id": 878},  # the end token's place
        {"eos_token_id": 5},  # no token of any text
    ],
)
def test_a_text_is_pooled_where_transformers_pools_it(tmp_path: Path, text: dict[str, Any]) -> None:
    from transformers import CLIPTokenizerFast

    config = clip_config(text=text)
    folder = write_clip(tmp_path / "checkpoint", config=config)
    tokenizer: Any = CLIPTokenizerFast.from_pretrained(folder)
    ours = rows_of(folder, tmp_path / "bundle", TEXTS)
    model = clip_model(config)
    with torch.inference_mode():
        expected = np.concatenate(
            [
                model.get_text_features(
                    **tokenizer(t, truncation=True, max_length=77, return_tensors="pt")
                ).numpy()
                for t in TEXTS
            ]
        )
    assert distance(ours, expected) < 1e-6


def test_a_side_that_is_stated_twice_and_a_processor_that_is_not_there(tmp_path: Path) -> None:
    config = clip_config()
    config["text_config_dict"] = dict(config["text_config"], num_attention_heads=4)
    folder = write_clip(tmp_path / "checkpoint", config=config, processor={})
    made = export_bundle(folder, tmp_path / "bundle", vision_precision="fp32", verify=True)
    assert "no preprocessor_config.json" in made.manifest.notes[0]
    assert made.manifest.image.size == 32


def test_an_open_clip_with_transformers_files_beside_it_is_read_as_those(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "checkpoint")
    write_json(folder / "open_clip_config.json", {"model_cfg": {}})
    assert inspect_source(folder).family == "clip"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not in"),
        ({"patch_size": 16}, "has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = write_clip(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"] |= change
    write_json(folder / "config.json", config)
    with pytest.raises(SourceError, match=reason):
        export_bundle(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("side", "change", "reason"),
    [
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool is True"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "only vision transformers"),
        ("text_cfg", {"hf_model_name": "xlm-roberta-base"}, "hf_model_name"),
        ("text_cfg", {"pool_type": "first"}, "pool_type is 'first'"),
    ],
)
def test_towers_of_open_clip_that_are_not_built_are_refused(
    tmp_path: Path, side: str, change: dict[str, Any], reason: str
) -> None:
    folder = write_open_clip(tmp_path / "checkpoint")
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"][side] |= change
    write_json(folder / "open_clip_config.json", config)
    with pytest.raises(SourceError, match=f"open_clip_config.json.*{reason}"):
        export_bundle(folder, tmp_path / "bundle")


def test_a_siglip_on_timms_tower_is_transformers_siglip(tmp_path: Path) -> None:
    model = write_open_clip_siglip(tmp_path / "checkpoint")
    made = export_bundle(
        tmp_path / "checkpoint", tmp_path / "bundle", vision_precision="fp32", verify=False
    )
    spec = made.manifest.text
    assert spec and spec.sigmoid and (spec.end, spec.pad) == ((1,), 1)
    assert (spec.bias, spec.clean) == (-2.5, "canonicalize")
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    ids = TextTokens(made.folder / "text.tokenizer.json", spec)(["A Dog!", "", "word " * 99])
    assert ids.shape == (3, 16) and ids[1].tolist() == [1] * 16 and ids[2, -1] == 1
    with torch.inference_mode():
        pictures = model.get_image_features(torch.from_numpy(pixels)).numpy()
        texts = model.get_text_features(torch.from_numpy(ids)).numpy()
    assert distance(embedded(made, "vision", pixels), pictures) < 1e-6
    assert distance(embedded(made, "text", ids), texts) < 1e-6


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_siglip(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"model_type": "siglip2"})
    with pytest.raises(SourceError, match="NaFlex"):
        export_bundle(folder, tmp_path / "bundle")


def test_a_missing_tokenizer_and_a_missing_scale_are_named(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        del tensors["logit_scale"]

    folder = write_clip(tmp_path / "checkpoint", edit=cut)
    with pytest.raises(SourceError, match="lacks the tensor logit_scale"):
        export_bundle(folder, tmp_path / "bundle")
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer.json.*copy the tokenizer"):
        export_bundle(folder, tmp_path / "bundle")


def test_options_of_a_decoder_are_refused_or_noted(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "checkpoint")
    with pytest.raises(SourceError, match="takes no --template"):
        export_bundle(folder, tmp_path / "bundle", template="vicuna_v1")
    with pytest.raises(ExportError, match="has no decoder, which --imatrix is for"):
        export_bundle(folder, tmp_path / "bundle", imatrix=True)
    made = export_bundle(folder, tmp_path / "bundle", quant="f32", verify=False)
    assert any("quant f32" in note for note in made.manifest.notes)
