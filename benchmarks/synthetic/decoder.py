"""Random weights as a quantized GGUF, each tensor of the type that llama.cpp would choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from edgevlm.export.decoder import TOKEN_EMBEDDING, DecoderSource, layout, metadata
from edgevlm.export.parts import KINDS
from edgevlm.export.tensors import SourceTensor
from edgevlm.export.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Token, Vocabulary
from edgevlm.family import Model

Bytes = npt.NDArray[np.uint8]

# File type, type of most matrices, of the embedding table (which is the output table, too), and of
# the matrices to which llama.cpp gives more bits.
QUANTS = {
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, "Q8_0", "Q8_0", "Q8_0"),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, "Q4_K", "Q6_K", "Q6_K"),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, "Q4_0", "Q6_K", "Q4_0"),
}
# Where the half-precision scales of a block lie, in bytes from its start, and the value that gives
# weights a deviation of about 0.02: everything else in a block may be any byte.
_SCALES = {
    "Q8_0": {0: 0.02 / 74},
    "Q4_0": {0: 0.02 / 4.6},
    "Q4_K": {0: 0.02 / 150, 2: 0.02 / 20},
    "Q6_K": {208: 0.02 / 1400},
}
# Blocks that are drawn; longer tensors repeat them.
_DRAWN = 1 << 14


def write_decoder(path: Path, name: str, model: Model, quant: str) -> None:
    """Writes a decoder of random weights at one of QUANTS."""
    shapes = KINDS[model.text["kind"]](model.text)
    tensors = {n: SourceTensor(n, path, "F32", shape, 0) for n, shape in shapes.items()}
    source = DecoderSource(tensors, model.text, _vocabulary(model.decoder.n_vocab), name)
    writer = GGUFWriter(path, source.config["kind"])
    try:
        metadata(writer, source)
        writer.add_file_type(QUANTS[quant][0])
        plan = [(n, t.shape, _type(n, t.shape, quant, model)) for n, t, _ in layout(source, "F32")]
        for tensor, shape, kind in plan:
            size = _bytes(shape, kind)
            raw = GGMLQuantizationType[kind]
            writer.add_tensor_info(tensor, shape, np.dtype(np.uint16), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.default_rng(0)
        for _, shape, kind in plan:
            writer.write_tensor_data(_values(shape, kind, rng))
    finally:
        writer.close()


def _type(name: str, shape: tuple[int, ...], quant: str, model: Model) -> str:
    if len(shape) == 1:
        return "F32"
    _, most, embedding, more = QUANTS[quant]
    if name == TOKEN_EMBEDDING:
        return embedding
    if ".attn_v." in name or ".ffn_down." in name:
        # llama.cpp's use_more_bits: the first and last eighth of the layers, a third of the rest.
        layer, n = int(name.split(".")[1]), model.decoder.n_layer
        if layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2:
            return more
    return most


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // elements * size


def _values(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> Bytes:
    """The bytes of a tensor: ones for the norms, random blocks with sane scales for matrices."""
    if kind == "F32":
        return np.ones(shape, np.float32).view(np.uint8)
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    n = int(np.prod(shape)) // elements
    blocks = rng.integers(0, 256, (min(n, _DRAWN), size), np.uint8)
    for at, scale in _SCALES[kind].items():
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return np.resize(blocks, n * size)


def _vocabulary(rows: int) -> Vocabulary:
    return Vocabulary(tuple(_tokens(rows)), {"pad": 0, "eos": 1, "bos": 2, "unk": 3})


def _tokens(rows: int) -> Iterator[Token]:
    """Special tokens, all bytes, the letters, and fillers that no text reaches."""
    for text, kind in (("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL),
                       ("<unk>", UNKNOWN)):  # fmt: skip
        yield Token(text, 0.0, kind)
    yield from (Token(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256))
    letters = ["\u2581", *map(chr, range(33, 127))]
    yield from (Token(text, -1.0, NORMAL) for text in letters)
    for i in range(rows - 4 - 256 - len(letters)):
        yield Token(f"\u2581filler{i}", -1e9, NORMAL)
