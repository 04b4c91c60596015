"""A published decoder GGUF: checked against what the exporter would write, then copied.

The tensors are taken byte by byte; metadata and vocabulary are written anew, so that texts become
the same tokens as in any other bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.errors import BundleCorrupt, SourceError
from edgevlm.export import precisions
from edgevlm.export.checkpoint.tensors import SourceTensor, Weights, stored, writable
from edgevlm.export.checkpoint.tokenizer.checks import plain
from edgevlm.export.checkpoint.tokenizer.vocabulary import UNUSED, Vocabulary
from edgevlm.export.gguf.decoder import DecoderSource, layout, metadata
from edgevlm.export.precisions import Quant
from edgevlm.gguf_file import GGUFFile, StoredTensor, opened
from edgevlm.parts import Decoder
from edgevlm.progress import Report, Stage


@dataclass(frozen=True)
class ReadyDecoder:
    """A checked file, its precision, and its tensors by GGUF's names."""

    path: Path
    quant: Quant
    tensors: Mapping[str, StoredTensor]


def expected(path: Path, config: Decoder) -> Weights:
    """The tensors that the exporter would write, of which names and shapes alone are known."""
    return {n: SourceTensor(n, path, "F32", shape, 0) for n, shape in config.tensors().items()}


def read(path: Path, config: Decoder, vocabulary: Vocabulary) -> ReadyDecoder:
    """Checks architecture, sizes, tensors and vocabulary of a file; raises SourceError."""
    try:
        with opened(path) as file:
            _check_sizes(path, file, config)
            _check_vocabulary(path, file, vocabulary)
            quant = _quant(path, file)
            tensors = file.tensors()
    except BundleCorrupt as e:
        raise SourceError(f"{e}; download it again") from None
    _check_tensors(path, tensors, DecoderSource(expected(path, config), config, vocabulary, ""))
    return ReadyDecoder(path, quant, tensors)


def _check_sizes(path: Path, file: GGUFFile, config: Decoder) -> None:
    a = config.architecture
    found = file.text("general.architecture")
    if found != a:
        raise SourceError(f"{path}: is a {found or '?'} decoder, config.json's is a {a}")
    heads = config.num_attention_heads
    sizes = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for key, size in sizes.items():
        # A file may leave it out where keys have as many heads as queries.
        number = file.number(f"{a}.{key}", heads if key == "attention.head_count_kv" else 0)
        if number != size:
            raise SourceError(
                f"{path}: its {a}.{key} is {number}, config.json's is {size}; "
                "it is another model's file"
            )
    constants = {
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, value in constants.items():
        stated = file.floats(f"{a}.{key}")
        if stated is not None and not math.isclose(stated[0], value, rel_tol=1e-5):
            raise SourceError(
                f"{path}: its {a}.{key} is {stated[0]:g}, config.json's is {value:g}; "
                "it is another model's file"
            )


def _check_vocabulary(path: Path, file: GGUFFile, vocabulary: Vocabulary) -> None:
    """Refuses a file whose rows belong to other tokens; those of no token may have any text."""
    texts, tokens = file.texts("tokenizer.ggml.tokens"), vocabulary.tokens
    if len(texts) != len(tokens):
        raise SourceError(
            f"{path}: has {len(texts)} tokens, the tokenizer {len(tokens)}; "
            "it is another model's file"
        )
    for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        if token.type != UNUSED and text != plain(token.text):
            raise SourceError(
                f"{path}: its token {i} is {text!r}, the tokenizer's is {plain(token.text)!r}; "
                "it is another model's file"
            )


def _quant(path: Path, file: GGUFFile) -> Quant:
    kind = file.number("general.file_type", -1)
    quant = precisions.by_file_type(kind)
    if quant is None:
        raise SourceError(
            f"{path}: its precision (general.file_type {kind}) is not known; take another file"
        )
    return quant


def _check_tensors(path: Path, found: Mapping[str, StoredTensor], source: DecoderSource) -> None:
    shapes = {name: tensor.shape for name, tensor, _ in layout(source, None)}
    for name in found:
        if name not in shapes:
            raise SourceError(f"{path}: {name} is not a tensor of this model; check config.json")
    for name, shape in shapes.items():
        if name not in found:
            raise SourceError(f"{path}: lacks {name}; download it again")
        rows, width = (1, *shape) if len(shape) == 1 else shape
        if (found[name].rows, found[name].width) != (rows, width):
            raise SourceError(
                f"{path}: {name} has shape {[found[name].rows, found[name].width]}, "
                f"config.json says {[rows, width]}"
            )


def copy(ready: ReadyDecoder, source: DecoderSource, path: Path, report: Report | None) -> None:
    """Writes a GGUF of the tensors of a checked file and the metadata of an export."""
    import gguf

    writer = gguf.GGUFWriter(path, source.config.architecture)
    shapes = {name: tensor.shape for name, tensor, _ in layout(source, None)}
    try:
        metadata(writer, source)
        writer.add_file_type(ready.quant.ftype)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in ready.tensors.items():
            kind = gguf.GGMLQuantizationType[tensor.type]
            # Of a type that holds whole values, lest the writer takes the shape for one of bytes.
            size = tensor.n_bytes
            writer.add_tensor_info(name, shapes[name], np.dtype(np.uint16), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stage = Stage(report, "decoder", sum(t.n_bytes for t in ready.tensors.values()), "B")
        for tensor in ready.tensors.values():
            values = stored(ready.path, tensor.offset, tensor.n_bytes, np.dtype(np.uint8))
            writer.write_tensor_data(writable(values))
            stage.advance(tensor.n_bytes)
    finally:
        writer.close()
