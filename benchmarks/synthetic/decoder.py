"""Random weights as a quantized GGUF, each tensor of the type that llama.cpp would choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgevlm.benchmarks.synthetic.tensors import DEVIATION, random_part
from edgevlm.benchmarks.synthetic.words import vocabulary
from edgevlm.export import precisions
from edgevlm.export.checkpoint.tensors import writable
from edgevlm.export.checkpoint.tokenizer.vocabulary import Vocabulary
from edgevlm.export.gguf.decoder import TOKEN_EMBEDDING, DecoderSource, layout, metadata
from edgevlm.family import Model
from edgevlm.parts import Decoder

Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """The types of a file: of most matrices, of the output table, of the values' and the second
    feed-forward matrices in the layers to which llama.cpp gives more bits. Queries, keys and values
    in one matrix count as values.
    """

    most: str
    output: str
    more: str = ""


# What llama.cpp's llama_tensor_get_type chooses without an importance matrix; a test asks it.
_MIXES = {
    "f32": Mix("F32", "F32"),
    "f16": Mix("F16", "F16"),
    "bf16": Mix("BF16", "BF16"),
    "q8_0": Mix("Q8_0", "Q8_0"),
    "q6_k": Mix("Q6_K", "Q6_K"),
    "q5_k_m": Mix("Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": Mix("Q4_K", "Q6_K", "Q6_K"),
    "q4_0": Mix("Q4_0", "Q6_K"),
    "iq4_xs": Mix("IQ4_XS", "Q6_K"),
}
QUANTS = tuple(_MIXES)
# iq4_xs gives Q5_K to values that this many queries share, and to the first eighth of the second
# feed-forward matrices.
_SHARED, _IQ4_MORE = 4, "Q5_K"
# What llama.cpp takes instead where a row is not a multiple of 256 wide (tensor_type_fallback).
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
# Where the half-precision scales of a block lie, in bytes from its start, and the value that gives
# weights a deviation of about 0.02: everything else in a block may be any byte.
_SCALES = {
    "Q8_0": {0: DEVIATION / 74},
    "Q4_0": {0: DEVIATION / 4.6},
    "Q4_K": {0: DEVIATION / 150, 2: DEVIATION / 20},
    "Q5_K": {0: DEVIATION / 310, 2: DEVIATION / 20},
    "Q6_K": {208: DEVIATION / 1400},
    "IQ4_XS": {0: DEVIATION / 1300},
    "Q5_0": {0: DEVIATION / 9.2},
    "Q5_1": {0: DEVIATION / 9.2, 2: -DEVIATION * 15.5 / 9.2},
    "IQ4_NL": {0: DEVIATION / 70},
}
# Blocks that are drawn; longer tensors repeat them.
_DRAWN = 1 << 14


def write_decoder(
    path: Path, name: str, model: Model, quant: str, added: Mapping[str, int]
) -> None:
    """Writes a decoder of random weights at one of QUANTS; `added` are tokens of its original's."""
    source = DecoderSource(random_part(model.text), model.text, vocabulary(model, added), name)
    plan = _plan(source, quant)
    writer = GGUFWriter(path, source.config.architecture)
    try:
        metadata(writer, source)
        writer.add_file_type(precisions.quant(quant).ftype)
        for tensor, shape, kind in plan:
            size, raw = _bytes(shape, kind), GGMLQuantizationType[kind]
            writer.add_tensor_info(tensor, shape, np.dtype(np.uint16), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.default_rng(0)
        for _, shape, kind in plan:
            writer.write_tensor_data(writable(_values(shape, kind, rng)))
    finally:
        writer.close()


def decoder_bytes(model: Model, quant: str) -> int:
    """Size of such a decoder's tensors."""
    source = DecoderSource(random_part(model.text), model.text, Vocabulary((), {}), "")
    return sum(_bytes(shape, kind) for _, shape, kind in _plan(source, quant))


def _plan(source: DecoderSource, quant: str) -> list[tuple[str, Shape, str]]:
    """Name, shape and type of every tensor, in the order of the file."""
    shapes = {name: tensor.shape for name, tensor, _ in layout(source, "F32")}
    output = "output.weight" if "output.weight" in shapes else TOKEN_EMBEDDING
    kinds = {name: _type(name, quant, source.config, output) for name in shapes}
    kinds |= {n: _NARROW.get(kinds[n], kinds[n]) for n, shape in shapes.items() if shape[-1] % 256}
    return [(n, shape, kinds[n] if len(shape) > 1 else "F32") for n, shape in shapes.items()]


def _type(name: str, quant: str, config: Decoder, output: str) -> str:
    mix = _MIXES[quant]
    if name == output:
        return mix.output
    values = ".attn_v." in name or ".attn_qkv." in name
    if not values and ".ffn_down." not in name:
        return mix.most
    layer, n = int(name.split(".")[1]), config.num_hidden_layers
    if quant == "iq4_xs":
        shared = config.num_attention_heads // config.num_key_value_heads >= _SHARED
        more = shared if values else layer < n // 8
        return _IQ4_MORE if more else mix.most
    # llama.cpp's use_more_bits: the first and last eighth of the layers, a third of the rest.
    more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    return mix.more if mix.more and more else mix.most


def _bytes(shape: Shape, kind: str) -> int:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // elements * size


def _values(shape: Shape, kind: str, rng: np.random.Generator) -> Bytes:
    """The bytes of a tensor: ones for the norms, for matrices random values or random blocks with
    sane scales.
    """
    if len(shape) == 1:
        return np.ones(shape, np.float32).view(np.uint8)
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    n = int(np.prod(shape)) // elements
    if kind not in _SCALES:
        return np.resize(_plain(kind, min(n, _DRAWN), rng), n * size)
    blocks = rng.integers(0, 256, (min(n, _DRAWN), size), np.uint8)
    for at, scale in _SCALES[kind].items():
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return np.resize(blocks, n * size)


def _plain(kind: str, n: int, rng: np.random.Generator) -> Bytes:
    values = rng.standard_normal(n, np.float32) * np.float32(DEVIATION)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
