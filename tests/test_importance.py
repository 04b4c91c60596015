"""Which weights matter: what llama.cpp is told of them, and the types it makes no other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm.bundle import Bundle
from edgevlm.errors import ExportError
from edgevlm.export import QUANTS, export_bundle, precisions, requantize_bundle
from edgevlm.export.gguf import decoder, importance
from edgevlm.export.gguf.tools import Matrix
from edgevlm.export.options import WriteOptions
from tests import inside
from tests.checkpoints.paligemma import write_paligemma


@pytest.fixture(scope="module")
def matrix(paligemma_bundle: Bundle) -> Matrix:
    return collected(paligemma_bundle)


def collected(bundle: Bundle) -> Matrix:
    """The importance matrix of a bundle's decoder, which answers in this process."""
    with inside.children():
        return importance.collect(bundle.folder, bundle.manifest, None)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: the search for codes of 1 and 2 bits is slow."""
    return write_paligemma(tmp_path_factory.mktemp("small"), layers=1, mlp=256)


@pytest.fixture(scope="module")
def small(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "small"
    return export_bundle(small_checkpoint, out, quant="f32", vision_precision="fp32", verify=False)


@pytest.fixture(scope="module")
def small_matrix(small: Bundle) -> Matrix:
    return collected(small)


def test_every_matrix_of_every_layer_is_weighed(matrix: Matrix, paligemma_bundle: Bundle) -> None:
    tensors = gguf.GGUFReader(paligemma_bundle.path("decoder")).tensors
    columns = {t.name: int(t.shape[0]) for t in tensors if len(t.shape) == 2 and "blk." in t.name}
    assert {name: len(values) for name, values in matrix.items()} == columns
    assert all(np.isfinite(v).all() and (v >= 0).all() and v.any() for v in matrix.values())
    # Queries, keys and values are made of the same rows.
    for name in ("attn_k", "attn_v"):
        assert np.array_equal(matrix["blk.1.attn_q.weight"], matrix[f"blk.1.{name}.weight"])


def test_an_rms_norm_leaves_unit_power(matrix: Matrix, paligemma_bundle: Bundle) -> None:
    (norm,) = (
        np.asarray(t.data)
        for t in gguf.GGUFReader(paligemma_bundle.path("decoder")).tensors
        if t.name == "blk.0.attn_norm.weight"
    )
    # Normalized rows have a mean square of one, so that this holds whatever was read.
    assert (matrix["blk.0.attn_q.weight"] / norm**2).mean() == pytest.approx(1, rel=1e-3)


def test_columns_that_matter_are_kept_nearer(
    paligemma_bundle: Bundle, matrix: Matrix, tmp_path: Path
) -> None:
    source, name = paligemma_bundle.path("decoder"), "blk.1.ffn_down.weight"
    weights = {"plain": None, "weighed": matrix}
    errors = {}
    for kind, given in weights.items():
        target = tmp_path / f"{kind}.gguf"
        quantized(source, target, "q3_k_s", given)
        exact, rounded = (values(path, name) for path in (source, target))
        errors[kind] = (np.square(rounded - exact) * matrix[name]).sum()
    assert errors["weighed"] < 0.95 * errors["plain"]


def quantized(source: Path, target: Path, quant: str, matrix: Matrix | None) -> None:
    """Quantizes a decoder in this process."""
    with inside.children():
        decoder.quantize(source, target, precisions.quant(quant), None, matrix)


def values(path: Path, name: str) -> NDArray[np.float32]:
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    found = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return np.asarray(found, np.float32)


# llama.cpp spends seconds on the tables of each other IQ type, however small the model;
# `python -m workshop.precisions` makes them all.
QUICK = [q for q in QUANTS if not q.startswith("iq") or q in ("iq2_xxs", "iq4_nl", "iq4_xs")]


@pytest.mark.parametrize("quant", QUICK)
def test_llama_cpp_makes_the_type(
    quant: str, small: Bundle, small_matrix: Matrix, tmp_path: Path
) -> None:
    target = tmp_path / "decoder.gguf"
    given = small_matrix if precisions.quant(quant).imatrix else None
    quantized(small.path("decoder"), target, quant, given)
    types = set(decoder.tensor_types(target).values())
    # The type's own name is that of most tensors: q4_k_m is made of Q4_K.
    stem = quant.upper().removesuffix("_M").removesuffix("_S").removesuffix("_L")
    assert any(stem.split("_X")[0] in kind for kind in types), types


@pytest.mark.parametrize("quant", [q for q in QUANTS if precisions.quant(q).imatrix])
def test_types_that_need_a_matrix_are_refused_without_one(quant: str) -> None:
    with pytest.raises(ExportError, match=f"'{quant}' is made with an importance matrix only"):
        WriteOptions.checked(quant, "fp32", imatrix=False)


def test_what_needs_a_matrix_says_so_and_no_more(paligemma_bundle: Bundle, tmp_path: Path) -> None:
    for quant in ("iq3_s", "q2_k"):
        decoder.quantize(
            paligemma_bundle.path("decoder"), tmp_path / quant, precisions.quant(quant), None
        )
    with pytest.raises(ExportError, match="cannot quantize it"):
        decoder.quantize(
            paligemma_bundle.path("decoder"), tmp_path / "x", precisions.quant("iq3_xs"), None
        )


def test_an_export_weighs_by_itself(small_checkpoint: Path, small: Bundle, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"quant": "q2_k_s", "vision_precision": "fp32", "verify": False}
    direct = export_bundle(small_checkpoint, tmp_path / "direct", **wanted)
    assert sorted(p.name for p in direct.folder.iterdir()) == [
        "decoder.gguf", "edgevlm.json", "projector.onnx", "vision.onnx",
    ]  # fmt: skip
    assert direct.manifest.components["decoder"].precision == "q2_k_s"
    assert "Q2_K" in decoder.tensor_types(direct.path("decoder")).values()
    again = requantize_bundle(small.folder, tmp_path / "again", quant="q2_k_s", verify=False)
    assert again.path("decoder").read_bytes() == direct.path("decoder").read_bytes()


def test_rounding_alone_takes_no_matrix() -> None:
    with pytest.raises(ExportError, match="'f16' rounds every weight alike; leave out --imatrix"):
        WriteOptions.checked("f16", "fp32", imatrix=True)
