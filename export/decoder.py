"""The language decoder: safetensors -> GGUF, one tensor in memory at a time.

The only module that imports gguf for writing. Knows llama.cpp's names for each architecture and
what its graphs expect of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import ExportError
from edgevlm.export import llama
from edgevlm.export.computed import stacked
from edgevlm.export.llama import Matrix
from edgevlm.export.parts import Part
from edgevlm.export.progress import Report, Stage
from edgevlm.export.quantize import Quant
from edgevlm.export.tensors import Tensor, to_float32, writable
from edgevlm.export.token_checks import is_misread
from edgevlm.export.tokenizer import Vocabulary
from edgevlm.family import Config
from edgevlm.gguf_file import opened
from edgevlm.specs import TensorPlace

if TYPE_CHECKING:
    import gguf

TOKEN_EMBEDDING = "token_embd.weight"
FILE = "decoder.gguf"

# Three of a layer's matrices that some architectures want as one.
_QKV = "self_attn.qkv"
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = {
    "llama": _LAYER_NAMES | {"post_attention_layernorm": "ffn_norm"},
    "phi3": {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "gemma": _LAYER_NAMES | {"post_attention_layernorm": "ffn_norm"},
    "gemma2": _LAYER_NAMES
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi2": {
        "input_layernorm": "attn_norm",
        _QKV: "attn_qkv",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
}
_TOP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "final_layernorm": "output_norm",
    "lm_head": "output",
}
# Norms that llama.cpp's graph of an architecture lacks, kept in the metadata for the runtime; an
# unknown tensor llama.cpp would refuse.
_EXTRA_NORMS = {
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.q_layernorm.bias": "attn_q_norm.bias",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
    "self_attn.k_layernorm.bias": "attn_k_norm.bias",
    "post_layernorm.weight": "post_attention_norm.weight",
}
# Gemma's norms scale by 1 + weight; llama.cpp's by the weight.
_NORM_OFFSET = {"gemma": 1, "gemma2": 1}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# llama.cpp divides by the final cap and would assume 30 without the key. PaliGemma 2 was trained
# without one, and transformers applies none; at this value tanh(x / cap) * cap is x in float32.
_NO_SOFTCAP = 1e5


@dataclass(frozen=True)
class DecoderSource:
    """What a GGUF is made of: tensors by canonical name, config, vocabulary, the model's name."""

    tensors: Part
    config: Config
    vocabulary: Vocabulary
    name: str

    @property
    def precision(self) -> str:
        """What the source's matrices are in; "f32", which holds any of them, where they differ."""
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

    `matrix` says how much each column of a tensor matters (export/importance.py).
    """
    with opened(source) as file:
        total = sum(tensor.elements for tensor in file.tensors().values())
    stage = Stage(report, "quantize", int(total * quant.bits / 8), "B")
    llama.quantize(source, target, quant.ftype, stage, matrix)
    if not quant.direct:
        _check_quantized(target, quant)


def write_gguf(source: DecoderSource, path: Path, type: str | None, report: Report | None) -> None:
    """Writes an unquantized GGUF: matrices as `type` ("F32", "F16", "BF16") or, with None, each as
    the source has it, without loss; vectors as F32.
    """
    import gguf

    writer = gguf.GGUFWriter(path, source.config["kind"])
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
    for i in range(source.config["num_hidden_layers"]):
        for name, target in _LAYER[source.config["kind"]].items():
            names[f"layers.{i}.{name}"] = f"blk.{i}.{target}"
    for name, target in names.items():
        for kind in ("weight", "bias"):
            if tensor := _tensor(source.tensors, f"{name}.{kind}"):
                stored = "F32" if len(tensor.shape) == 1 else type or tensor.dtype
                yield f"{target}.{kind}", tensor, stored


def _tensor(tensors: Part, name: str) -> Tensor | None:
    """The tensor of that name; queries, keys and values as one where they go into one."""
    stem, kind = name.rsplit(".", 1)
    if not stem.endswith(_QKV):
        return tensors.get(name)
    layer = stem.removesuffix("qkv")
    return stacked(tuple(tensors[f"{layer}{x}_proj.{kind}"] for x in "qkv"), name)


def _gain(name: str, config: Config) -> float:
    """What a matrix is multiplied by so that llama.cpp's graph computes what the source does.

    Gemma 2 scales its scores by query_pre_attn_scalar ** -0.5, llama.cpp by head_dim ** -0.5. The
    two are equal in every published checkpoint.
    """
    if config["kind"] == "gemma2" and ".attn_q." in name:
        return math.sqrt(config["head_dim"] / config["query_pre_attn_scalar"])
    return 1.0


def _values(name: str, tensor: Tensor, stored: str, config: Config) -> NDArray[Any]:
    raw, gain = tensor.raw(), _gain(name, config)
    if len(tensor.shape) == 1:
        return to_float32(raw, tensor.dtype) + np.float32(_NORM_OFFSET.get(config["kind"], 0))
    if config["kind"] == "llama":
        raw = _interleaved(name, raw, config)
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


def _interleaved(name: str, raw: NDArray[Any], config: Config) -> NDArray[Any]:
    """Queries and keys in the order of llama.cpp's "llama" graph, whose rotary positions turn
    neighbouring rows; transformers' turn rows that lie half a head apart.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    for part, key in heads.items():
        if f".{part}." in name:
            halves = raw.reshape(config[key], 2, config["head_dim"] // 2, raw.shape[1])
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
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    if c["kind"] in ("llama", "phi3"):
        writer.add_rope_dimension_count(c["head_dim"])
        writer.add_vocab_size(c["vocab_size"])
    if c["kind"] == "phi2":
        writer.add_layer_norm_eps(c["layer_norm_eps"])
        writer.add_rope_dimension_count(c["rotary_dim"])
        writer.add_vocab_size(c["vocab_size"])
        if c["extra_norms"]:
            _extra_norms(writer, source)
    if c["kind"] == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"] or _NO_SOFTCAP)
        writer.add_final_logit_softcapping(_NO_SOFTCAP)
        # PaliGemma's prefix has no window; llama.cpp would cut one longer than this.
        writer.add_sliding_window(c["max_position_embeddings"])
    _vocabulary(writer, source.vocabulary)


def _extra_norms(writer: gguf.GGUFWriter, source: DecoderSource) -> None:
    layers = range(source.config["num_hidden_layers"])
    for name, target in _EXTRA_NORMS.items():
        values = np.concatenate([source.tensors[f"layers.{i}.{name}"].float32() for i in layers])
        writer.add_array(f"tinygptv.{target}", values.tolist())


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


def embedding_place(path: Path) -> TensorPlace:
    """Where the token-embedding table lies in a GGUF file."""
    with opened(path) as file:
        table = file.tensors().get(TOKEN_EMBEDDING)
    if not table:
        raise ExportError(f"{path}: has no {TOKEN_EMBEDDING}")
    return TensorPlace(table.offset, table.type, table.rows, table.width)


def tensor_types(path: Path) -> Mapping[str, str]:
    """GGUF tensor name -> ggml type name."""
    with opened(path) as file:
        return {name: tensor.type for name, tensor in file.tensors().items()}


def _check_quantized(path: Path, quant: Quant) -> None:
    """llama.cpp falls back where a row is no multiple of a block; refuses a file of fallbacks."""
    types = {n: t for n, t in tensor_types(path).items() if n.startswith("blk.")}
    if set(types.values()) <= {"F32", "F16", "BF16"}:
        raise ExportError(
            f"quant {quant.name!r}: no row of this decoder is a multiple of 32 wide, so nothing "
            "would be quantized; choose f16"
        )
