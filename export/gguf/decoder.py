"""The language decoder: safetensors -> GGUF, one tensor in memory at a time.

What llama.cpp's graph of an architecture expects of the weights stands in the decoder's room
(export/parts/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import ExportError
from edgevlm.export.checkpoint.computed import constant, stacked
from edgevlm.export.checkpoint.tensors import Tensor, Weights, to_float32, writable
from edgevlm.export.checkpoint.tokenizer.checks import is_misread
from edgevlm.export.checkpoint.tokenizer.vocabulary import Vocabulary
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.tools import Matrix
from edgevlm.export.parts import graph
from edgevlm.export.precisions import Quant
from edgevlm.gguf_file import opened
from edgevlm.parts import Decoder
from edgevlm.progress import Report, Stage
from edgevlm.specs import TensorLocation

if TYPE_CHECKING:
    import gguf

TOKEN_EMBEDDING = "token_embd.weight"
FILE = "decoder.gguf"

_TOP = {
    "token_embd": ("embed_tokens",),
    "output_norm": ("norm", "final_layernorm"),
    "output": ("lm_head",),
}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class DecoderSource:
    """The content of a GGUF: tensors by canonical name, config, vocabulary, the model's name."""

    tensors: Weights
    config: Decoder
    vocabulary: Vocabulary
    name: str

    @property
    def precision(self) -> str:
        """The source's precision; "f32", which holds any of them, where its matrices differ."""
        kinds = {t.dtype.lower() for t in self.tensors.values() if len(t.shape) > 1}
        return kinds.pop() if len(kinds) == 1 else "f32"


def write_decoder(source: DecoderSource, folder: Path, quant: Quant, report: Report | None) -> Path:
    """Writes decoder.gguf into `folder` at a precision; raises SourceError or ExportError."""
    path = folder / FILE
    if quant.direct:
        write_gguf(source, path, quant.direct, report)
        return path
    unquantized = folder / "unquantized.gguf"
    write_gguf(source, unquantized, None, report)
    quantize(unquantized, path, quant, report)
    unquantized.unlink()
    return path


def quantize(
    source: Path, target: Path, quant: Quant, report: Report | None, matrix: Matrix | None = None
) -> None:
    """Writes a GGUF at a precision from one in f32, f16 or bf16; raises ExportError.

    `matrix` says how much each column of a tensor matters (export/gguf/importance.py).
    """
    with opened(source) as file:
        total = sum(tensor.elements for tensor in file.tensors().values())
    stage = Stage(report, "quantize", int(total * quant.bits / 8), "B")
    tools.quantize(source, target, quant.ftype, stage, matrix)
    if not quant.direct:
        _check_quantized(target, quant)


def write_gguf(source: DecoderSource, path: Path, type: str | None, report: Report | None) -> None:
    """Writes an unquantized GGUF: matrices as `type` ("F32", "F16", "BF16") or, with None, each as
    the source has it, without loss; vectors as F32.
    """
    import gguf

    writer = gguf.GGUFWriter(path, source.config.architecture)
    try:
        metadata(writer, source)
        writer.add_file_type({"F16": 1, "BF16": 32}.get(type or "", 0))
        plan = list(layout(source, type))
        for name, tensor, stored in plan:
            kind, size = gguf.GGMLQuantizationType[stored], tensor.elements * _BYTES[stored]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.uint16), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stage = Stage(report, "decoder", sum(t.elements * _BYTES[s] for _, t, s in plan), "B")
        for name, tensor, stored in plan:
            writer.write_tensor_data(writable(_values(name, tensor, stored, source.config)))
            stage.advance(tensor.elements * _BYTES[stored])
    finally:
        writer.close()


def layout(source: DecoderSource, type: str | None) -> Iterator[tuple[str, Tensor, str]]:
    """(GGUF name, source tensor, stored type) in the order of the layers."""
    names = dict(_TOP)
    for i in range(source.config.num_hidden_layers):
        for target, stems in graph(source.config).layer.items():
            stacks = (stems,) if isinstance(stems, str) else stems
            names[f"blk.{i}.{target}"] = tuple(f"layers.{i}.{stem}" for stem in stacks)
    for target, stems in names.items():
        for kind in ("weight", "bias"):
            found = [t for stem in stems if (t := source.tensors.get(f"{stem}.{kind}"))]
            if found:
                tensor = found[0] if len(found) == 1 else stacked(tuple(found), target)
                stored = "F32" if len(tensor.shape) == 1 else type or tensor.dtype
                yield f"{target}.{kind}", tensor, stored
    for name, values in graph(source.config).extra(source.config).items():
        yield name, constant(name, values), "F32"


def _values(name: str, tensor: Tensor, stored: str, config: Decoder) -> NDArray[Any]:
    expected, raw = graph(config), tensor.raw()
    gain = expected.gain(name, config)
    if len(tensor.shape) == 1:
        return (to_float32(raw, tensor.dtype) + np.float32(expected.norm_offset)) * np.float32(gain)
    if expected.permuted:
        raw = _permuted(name, raw, config)
    if stored == tensor.dtype and gain == 1.0:
        return raw
    values = to_float32(raw, tensor.dtype) * np.float32(gain)
    if stored == "BF16":
        return _bfloat16(values)
    if stored == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ExportError(f"{tensor.name}: does not fit into f16; choose bf16 or f32")
        return half
    return values


def _permuted(name: str, raw: NDArray[Any], config: Decoder) -> NDArray[Any]:
    """Rows of queries and keys, neighbours where half a head lay between them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for part, n in heads.items():
        if f".{part}." in name:
            halves = raw.reshape(n, 2, config.head_dim // 2, raw.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(raw.shape))
    return raw


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def metadata(writer: gguf.GGUFWriter, source: DecoderSource) -> None:
    """Adds everything but tensors and file type: sizes, constants, the vocabulary."""
    c = source.config
    if not is_misread(source.name):
        writer.add_name(source.name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    graph(c).metadata(writer, c, source.tensors)
    _vocabulary(writer, source.vocabulary)


def _vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    tokens = vocabulary.tokens
    writer.add_tokenizer_model("gpt2" if vocabulary.merges else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([t.text for t in tokens])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores([t.score for t in tokens])
    writer.add_token_types([t.type for t in tokens])
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, i in vocabulary.specials.items():
        adders[name](i)
    # The prompt spec says where the begin token stands.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def embedding_location(path: Path) -> TensorLocation:
    """Locates the token-embedding table in a GGUF file."""
    with opened(path) as file:
        table = file.tensors().get(TOKEN_EMBEDDING)
    if not table:
        raise ExportError(f"{path}: has no {TOKEN_EMBEDDING}")
    return TensorLocation(table.offset, table.type, table.rows, table.width)


def tensor_types(path: Path) -> Mapping[str, str]:
    """GGUF tensor name -> ggml type name."""
    with opened(path) as file:
        return {name: tensor.type for name, tensor in file.tensors().items()}


def _check_quantized(path: Path, quant: Quant) -> None:
    """llama.cpp falls back where a row does not divide into blocks; refuses a file of fallbacks."""
    types = {n: t for n, t in tensor_types(path).items() if n.startswith("blk.")}
    if set(types.values()) <= {"F32", "F16", "BF16"}:
        raise ExportError(
            f"quant {quant.name!r}: no row of this decoder is a multiple of 32 wide, so nothing "
            "would be quantized; choose f16"
        )
