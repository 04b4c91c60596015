"""The encoder and projector as ONNX against transformers, at every precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgevlm.benchmarks.checkpoints import write_paligemma
from edgevlm.errors import EngineMissing
from edgevlm.export import components, images, onnx_files, quantize
from edgevlm.export.components import distance
from edgevlm.export.pipeline import Options, prepare
from edgevlm.export.progress import Stage

Array = NDArray[Any]


def write(folder: Path, out: Path, precision: str) -> tuple[Path, Path]:
    """vision.onnx and projector.onnx of a checkpoint."""
    job = prepare(folder, Options("f32", precision, False, None), None)
    (out / "work").mkdir(parents=True)
    vision = components._write_vision(job, out, out / "work")
    projector = components._write_projector(job, out, out / "work")
    return vision[0], projector[0]


def original(folder: Path, pixels: Array) -> tuple[Array, Array]:
    """Features and image embeddings as transformers' own loader and model make them."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        values = torch.from_numpy(pixels)
        features = model.model.vision_tower(values).last_hidden_state
        return features.numpy(), model.model.get_image_features(values).numpy()


def pixels_for(folder: Path) -> Array:
    return images.calibration(
        prepare(folder, Options("f32", "fp32", False, None), None).model.image
    )


# Widths as odd as SigLIP's 1152 = 16 heads of 72 and 4304.
ODD = {"version": 2, "vision_width": 72, "vision_heads": 1, "vision_mlp": 269, "size": 28}


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "fp32"),
        ({}, "fp16"),
        ({}, "int8"),
        ({"outliers": True}, "int8"),
        (ODD, "fp32"),
        (ODD, "int8"),
    ],
)
def test_features_and_embeddings(tmp_path: Path, options: dict[str, Any], precision: str) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", **options)
    vision, projector = write(folder, tmp_path / "out", precision)
    pixels = pixels_for(folder)
    features, embeddings = original(folder, pixels)
    ours = onnx_files.run(vision, "pixels", pixels)
    assert ours.shape == features.shape
    bound = {"fp32": 1e-6, "fp16": 1e-5, "int8": 0.01}[precision]
    assert distance(ours, features) <= bound
    # The projector itself stays in float32 and carries 1 / sqrt(n_embd), as transformers does.
    exact = onnx_files.run(projector, "features", features)
    assert np.abs(exact - embeddings).max() <= 1e-4 * embeddings.std()


def test_batch_is_dynamic_and_names_are_the_bundles(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    import onnxruntime

    vision, projector = write(paligemma_checkpoint, tmp_path / "out", "fp32")
    for path, given, got in ((vision, "pixels", "features"), (projector, "features", "embeddings")):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
        assert (inputs.name, outputs.name) == (given, got)
        assert isinstance(inputs.shape[0], str) and inputs.type == outputs.type == "tensor(float)"
        for n in (1, 5):
            batch = np.zeros((n, *inputs.shape[1:]), np.float32)
            assert session.run(None, {given: batch})[0].shape[0] == n
        assert onnx.load(path).opset_import[0].version == 18


def test_int8_leaves_out_what_is_too_noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", outliers=True)
    (int8,) = (v for v in quantize._VISION if v.name == "int8")
    pixels = pixels_for(folder)
    monkeypatch.setattr(quantize, "_VISION", (replace(int8, cosine=1e-4),))
    vision, _ = write(folder, tmp_path / "out", "int8")
    kinds = [n.op_type for n in onnx.load(vision).graph.node]
    assert "MatMulInteger" in kinds
    assert len(onnx_files.matmuls(vision)) >= 3
    ours = onnx_files.run(vision, "pixels", pixels)
    assert distance(ours, original(folder, pixels)[0]) <= 1e-4


def test_precisions_shrink_the_file(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    sizes = [
        write(paligemma_checkpoint, tmp_path / p, p)[0].stat().st_size
        for p in ("fp32", "fp16", "int8")
    ]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.7 * sizes[0]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_large_weights_lie_in_a_file_of_their_own(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    plain, _ = write(paligemma_checkpoint, tmp_path / "plain", precision)
    monkeypatch.setattr(onnx_files, "EXTERNAL_BYTES", 1000)
    split, _ = write(paligemma_checkpoint, tmp_path / "split", precision)
    names = [p.name for p in onnx_files.files(split)]
    assert names == ["vision.onnx", "vision.onnx.data"]
    assert split.stat().st_size < plain.stat().st_size / 2
    assert len({p.stat().st_mode for p in onnx_files.files(split)}) == 1
    pixels = pixels_for(paligemma_checkpoint)
    a, b = (onnx_files.run(p, "pixels", pixels) for p in (plain, split))
    assert np.array_equal(a, b)


def test_nothing_is_printed(
    paligemma_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(paligemma_checkpoint, tmp_path / "out", "int8")
    assert capfd.readouterr() == ("", "")


def test_missing_torch_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.delitem(sys.modules, "edgevlm.export.vision", raising=False)
    with pytest.raises(EngineMissing, match=r'pip install "edgevlm\[export\]"'):
        __import__("edgevlm.export.vision")


def test_node_names_match_the_traced_graph(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    from edgevlm.export import vision

    job = prepare(paligemma_checkpoint, Options("f32", "fp32", False, None), None)
    encoder = vision.build_encoder(
        job.model.vision, job.parts["vision"], Stage(None, "vision", 1, "")
    )
    vision.trace_encoder(encoder, tmp_path / "vision.onnx")
    noise = vision.activation_noise(encoder, images.calibration(job.model.image))
    assert {vision.node_name(n) for n in noise} == set(onnx_files.matmuls(tmp_path / "vision.onnx"))
