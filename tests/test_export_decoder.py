"""The GGUF: what stands in it, and which types its tensors have at each quantization."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgevlm.errors import ExportError, SourceError
from edgevlm.export import precisions
from edgevlm.export.checkpoint.tensors import SourceTensor, writable
from edgevlm.export.checkpoint.tokenizer.vocabulary import read_vocabulary
from edgevlm.export.gguf import decoder
from edgevlm.export.gguf.decoder import DecoderSource, write_decoder
from edgevlm.export.options import ReadOptions
from edgevlm.export.pipeline import read
from edgevlm.gguf_file import opened
from tests.checkpoints.paligemma import LAYOUTS, write_paligemma
from tests.test_export_source import with_nan


def source(folder: Path) -> DecoderSource:
    job = read(folder, ReadOptions(name="tiny"))
    table = read_vocabulary(job.checkpoint, job.model)
    return DecoderSource(job.parts["decoder"], job.model.text, table, job.name)


def write(folder: Path, out: Path, quant: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return write_decoder(source(folder), out, precisions.quant(quant), None)


def fields(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def test_gemma_metadata(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    found = fields(write(paligemma_checkpoint, tmp_path, "f32"))
    assert found["general.architecture"] == "gemma" and found["general.name"] == "tiny"
    expected = {
        "context_length": 8192,
        "embedding_length": 256,
        "block_count": 3,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 64,
        "attention.value_length": 64,
    }
    assert {k: found[f"gemma.{k}"] for k in expected} == expected
    assert found["gemma.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert found["tokenizer.ggml.model"] == "llama"
    assert not found["tokenizer.ggml.add_bos_token"]
    assert not found["tokenizer.ggml.add_space_prefix"]


def test_gemma2_has_no_window_and_no_final_cap(paligemma2_checkpoint: Path, tmp_path: Path) -> None:
    found = fields(write(paligemma2_checkpoint, tmp_path, "f32"))
    assert found["gemma2.attention.sliding_window"] == found["gemma2.context_length"] == 8192
    assert found["gemma2.attn_logit_softcapping"] == 50
    assert found["gemma2.final_logit_softcapping"] == pytest.approx(1e5)


def test_norms_are_one_more_and_matrices_as_they_were(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    given = source(paligemma_checkpoint).tensors
    path = write(paligemma_checkpoint, tmp_path, "f32")
    found = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}
    up = given["layers.2.mlp.up_proj.weight"].float32()
    assert np.array_equal(found["blk.2.ffn_up.weight"], up)
    norm = given["layers.1.input_layernorm.weight"].float32()
    assert np.array_equal(found["blk.1.attn_norm.weight"], norm + 1)
    assert len(found) == len(given)


def test_every_layout_and_sharding_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for layout in LAYOUTS:
        folder = write_paligemma(tmp_path / layout, layout=layout, shards=2)
        files.append(write(folder, tmp_path / f"out-{layout}", "f16").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant", ["f32", "f16", "bf16"])
def test_direct_types_round_once(tmp_path: Path, dtype: str, quant: str) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", dtype=dtype)
    path = write(folder, tmp_path / "out", quant)
    given = source(folder).tensors["layers.0.mlp.gate_proj.weight"].float32()
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_gate.weight")
    found = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    assert tensor.tensor_type.name == quant.upper()
    error = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}[quant]
    if {"float16": "f16", "bfloat16": "bf16"}.get(dtype) == quant:
        error = 0.0
    # Below the smallest normal half, what is lost is absolute.
    assert (np.abs(found - given) <= error * np.abs(given) + (6e-8 if error else 0)).all()
    norms = [t for t in gguf.GGUFReader(path).tensors if "norm" in t.name]
    assert {t.tensor_type.name for t in norms} == {"F32"}


@pytest.mark.parametrize(
    ("quant", "main", "table"),
    [
        ("q8_0", "Q8_0", "Q8_0"),
        ("q6_k", "Q6_K", "Q6_K"),
        ("q5_k_m", "Q5_K", "Q6_K"),
        ("q4_k_m", "Q4_K", "Q6_K"),
        ("q4_0", "Q4_0", "Q6_K"),
        ("iq4_xs", "IQ4_XS", "Q6_K"),
    ],
)
def test_quantized_types(
    paligemma_checkpoint: Path, tmp_path: Path, quant: str, main: str, table: str
) -> None:
    path = write(paligemma_checkpoint, tmp_path, quant)
    types = decoder.tensor_types(path)
    assert types["blk.1.ffn_up.weight"] == main
    assert types["token_embd.weight"] == table
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert [p.name for p in tmp_path.iterdir()] == ["decoder.gguf"]


def test_ggml_reads_of_a_file_what_gguf_py_does(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    path = write(paligemma_checkpoint, tmp_path, "q4_k_m")
    reader = gguf.GGUFReader(path)
    expected = {
        t.name: (t.tensor_type.name, t.n_elements, t.shape[0], t.n_bytes, t.data_offset)
        for t in reader.tensors
    }
    with opened(path) as file:
        found = file.tensors()
        assert file.number("gemma.block_count", 0) == reader.fields["gemma.block_count"].contents()
        assert file.number("gemma.absent", 7) == 7
        assert file.floats("gemma.absent") is None
    assert {
        name: (t.type, t.elements, t.width, t.n_bytes, t.offset) for name, t in found.items()
    } == expected


def test_place_of_the_token_embedding(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    path = write(paligemma_checkpoint, tmp_path, "f32")
    place = decoder.embedding_location(path)
    table = np.fromfile(path, np.float32, place.rows * place.width, offset=place.offset)
    expected = source(paligemma_checkpoint).tensors["embed_tokens.weight"].float32()
    assert np.array_equal(table.reshape(place.rows, place.width), expected)


def test_rows_that_no_k_quant_takes_fall_back(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", width=96, head_dim=24, mlp=160)
    types = decoder.tensor_types(write(folder, tmp_path / "out", "q4_k_m"))
    assert types["blk.1.ffn_up.weight"] == "Q5_0"


def test_nothing_left_to_quantize(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", width=72, head_dim=18, heads=4, mlp=100)
    with pytest.raises(ExportError, match="nothing would be quantized; choose f16"):
        write(folder, tmp_path / "out", "q4_k_m")


def test_nan_stops_the_export(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", edit=with_nan)
    with pytest.raises(SourceError, match="holds NaN or infinity"):
        write(folder, tmp_path / "out", "f16")


def test_too_large_for_half_precision(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6

    folder = write_paligemma(tmp_path / "checkpoint", edit=enlarge)
    with pytest.raises(ExportError, match="does not fit into f16; choose bf16 or f32"):
        write(folder, tmp_path / "out", "f16")


def test_nothing_is_printed(
    paligemma_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(paligemma_checkpoint, tmp_path, "q4_k_m")
    assert capfd.readouterr() == ("", "")


def test_tensors_are_read_and_written_without_what_swallows_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy asks isinstance(file, os.PathLike), in Python, and takes an interrupt for a "yes"."""
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    path = tmp_path / "values"

    def interrupted(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(abc.ABCMeta, "__instancecheck__", interrupted)
    with path.open("wb") as file:
        with pytest.raises(TypeError, match="not BufferedWriter"):
            values.tofile(file)
        writable(values).tofile(file)
        writable(values[:, ::2]).tofile(file)
    found = SourceTensor("name", path, "F32", (3, 4), 0).raw()
    rest = SourceTensor("name", path, "F32", (3, 2), values.nbytes).raw()
    monkeypatch.undo()
    assert np.array_equal(found, values) and np.array_equal(rest, values[:, ::2])


def test_an_interrupt_while_a_tensor_is_written_is_one(tmp_path: Path) -> None:
    class Interrupted:
        def write(self, data: Any) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writable(np.zeros(3, np.float16)).tofile(Interrupted())  # type: ignore[arg-type]
