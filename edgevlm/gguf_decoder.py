"""A decoder's GGUF, looked at before llama.cpp loads it.

llama.cpp asserts much of what it reads and ends the process where that does not hold: numbers of
layers and heads, lengths of arrays, tokens that are there twice. So only keys that are known here
may stand in a file, each of its type and within its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import BundleCorrupt
from edgevlm.gguf_header import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Damaged,
    Header,
    KeyValue,
    read_header,
)

_ARCHITECTURE = "general.architecture"
_TOKENIZER = "tokenizer.ggml."
_TOKENS = f"{_TOKENIZER}tokens"
_BYTE, _LAST_TYPE = 6, 6
_TOKENIZERS = (b"llama", b"gpt2")
# What the exporter writes (export/checkpoint/tokenizer/byte_pairs.py); others llama.cpp may cut by
# std::regex, on which a long text ends the process.
_CUT = (
    *(b"default", b"gpt-2", b"phi-2", b"llama-bpe", b"smaug-bpe", b"smollm", b"qwen2"),
    b"deepseek-llm",
)
# llama.cpp's own bounds of layers and heads; the others are beyond any model.
_MOST_LAYERS, _MOST_HEADS, _MOST_WIDTH, _MOST_CONTEXT = 512, 1024, 1 << 20, 1 << 24
# Types that llama.cpp computes with.
_WEIGHTS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"),
    *(
        "Q6_K",
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
    ),
)
# Prefixes of keys that llama.cpp shows and computes nothing from.
_CARRIED = ("general.", "edgevlm.", "tinygptv.", "quantize.")

Fits = Callable[[KeyValue], bool]


def check_decoder(path: Path, *, tokenizer: bool = True) -> None:
    """Raises BundleCorrupt for a file on which llama.cpp could end the process.

    Without `tokenizer` it may have the vocabulary of a trimmed decoder, which spells no texts.
    """
    header = read_header(path)
    try:
        _check_sizes(header)
        _check_vocabulary(header.values, tokenizer)
        for name, tensor in header.tensors.items():
            if tensor.type not in (_WEIGHTS if len(tensor.shape) > 1 else ("F32",)):
                raise Damaged(f"{name!r} is of the type {tensor.type}")
    except Damaged as e:
        raise BundleCorrupt(path, f"is not a decoder that llama.cpp can load ({e})") from None


def _whole(low: int, high: int) -> Fits:
    return lambda v: not v.array and v.type == UINT32 and low <= v.value <= high


def _positive(high: float) -> Fits:
    return lambda v: not v.array and v.type == FLOAT32 and 0 < v.value <= high


def _text(*allowed: bytes) -> Fits:
    return lambda v: not v.array and v.type == STRING and (not allowed or v.value in allowed)


def _flag(value: KeyValue) -> bool:
    return not value.array and value.type == BOOL


_SIZE = _whole(1, _MOST_WIDTH)
# Keys after the architecture's name.
_SIZES: Mapping[str, Fits] = {
    "attention.head_count": _whole(1, _MOST_HEADS),
    "attention.head_count_kv": _whole(1, _MOST_HEADS),
    "attention.key_length": _SIZE,
    "attention.layer_norm_epsilon": _positive(1),
    "attention.layer_norm_rms_epsilon": _positive(1),
    "attention.sliding_window": _whole(1, _MOST_CONTEXT),
    "attention.sliding_window_pattern": lambda v: v.array and v.type == BOOL,
    "attention.value_length": _SIZE,
    "attn_logit_softcapping": _positive(math.inf),
    "block_count": _whole(1, _MOST_LAYERS),
    "context_length": _whole(1, _MOST_CONTEXT),
    "embedding_length": _SIZE,
    "feed_forward_length": _whole(1, _MOST_WIDTH),
    "final_logit_softcapping": _positive(math.inf),
    "rope.dimension_count": _SIZE,
    "rope.dimension_sections": lambda v: v.array and v.type == INT32 and len(v.value) == 4,
    "rope.freq_base": _positive(1e12),
    "rope.freq_base_swa": _positive(1e12),
    "rope.scaling.attn_factor": _positive(1e6),
    "rope.scaling.factor": _positive(1e6),
    "rope.scaling.original_context_length": _whole(1, _MOST_CONTEXT),
    "rope.scaling.type": _text(b"none", b"linear", b"yarn"),
    "vocab_size": _whole(1, 1 << 24),
}
_NEEDED = ("attention.head_count", "block_count", "context_length", "embedding_length")


def _check_sizes(header: Header) -> None:
    values = header.values
    name = values.get(_ARCHITECTURE)
    if not name or not _text()(name):
        raise Damaged(f"{_ARCHITECTURE} is not a text")
    prefix = name.value.decode(errors="replace") + "."
    sizes = {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}
    for key, value in values.items():
        inside = key.removeprefix(prefix)
        known = _SIZES.get(inside) if inside != key else _VOCABULARY.get(key)
        if known is None and not key.startswith(_CARRIED):
            raise Damaged(f"{key!r} is not known")
        if known and not known(value):
            raise Damaged(f"{key!r} is {_shown(value)}")
    for key in _NEEDED:
        if key not in sizes:
            raise Damaged(f"{prefix}{key} is missing")
    _check_heads({key: v.value for key, v in sizes.items()})


def _check_heads(sizes: Mapping[str, Any]) -> None:
    heads, width = sizes["attention.head_count"], sizes["embedding_length"]
    groups = sizes.get("attention.head_count_kv", heads)
    size = sizes.get("attention.key_length", width // heads)
    turned = sizes.get("rope.dimension_count", size)
    if heads % groups or not size or size % 2 or turned % 2 or turned > size:
        raise Damaged(f"{heads} heads of {size} values in {groups} groups, {turned} turned")
    if len(sizes.get("attention.sliding_window_pattern", ())) not in (0, sizes["block_count"]):
        raise Damaged("a window for another number of layers")
    sections = sizes.get("rope.dimension_sections")
    if sections is not None and ((sections < 0).any() or sections.sum() > turned):
        raise Damaged(f"rope in sections of {sections.tolist()}")


# A token's id is compared with the vocabulary's size by llama.cpp, which passes over a larger one.
_VOCABULARY: Mapping[str, Fits] = {
    **{
        f"{_TOKENIZER}{name}_token_id": _whole(0, 2**32 - 1)
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom", "seperator", "mask")
    },
    **{
        f"{_TOKENIZER}{name}": _flag
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
    },
    f"{_TOKENIZER}model": _text(*_TOKENIZERS),
    f"{_TOKENIZER}pre": _text(*_CUT),
    _TOKENS: lambda v: v.array and v.type == STRING and len(v.value) > 0,
    f"{_TOKENIZER}merges": lambda v: v.array and v.type == STRING,
    f"{_TOKENIZER}scores": lambda v: v.array and v.type == FLOAT32 and np.isfinite(v.value).all(),
    f"{_TOKENIZER}token_type": lambda v: v.array and v.type == INT32,
}


def _check_vocabulary(values: Mapping[str, KeyValue], tokenizer: bool) -> None:
    if missing := {f"{_TOKENIZER}model", _TOKENS} - {*values}:
        raise Damaged(f"{min(missing)!r} is missing")
    texts, pieces = values[_TOKENS].value, values[f"{_TOKENIZER}model"].value == b"llama"
    # llama.cpp reads a text up to its first NUL, and gives one that is empty then its own name.
    read = [text for text in (each.partition(b"\0")[0] for each in texts) if text]
    if len({*read}) < len(read) or b"" in texts:
        raise Damaged("two tokens have the same text, or one has none")
    for key in ("scores", "token_type"):
        found = values.get(f"{_TOKENIZER}{key}")
        if found is not None and len(found.value) != len(texts):
            raise Damaged(f"{_TOKENIZER}{key} are {len(found.value)} for {len(texts)} tokens")
    types = values.get(f"{_TOKENIZER}token_type")
    if types is None or types.value.min() < 1 or types.value.max() > _LAST_TYPE:
        raise Damaged(f"{_TOKENIZER}token_type is not of the types 1 to {_LAST_TYPE}")
    bytes_there = {texts[i] for i in np.flatnonzero(types.value == _BYTE)}
    every = {b"<0x%02X>" % b for b in range(256)} if pieces else set[bytes]()
    if not bytes_there <= every or (tokenizer and bytes_there != every):
        raise Damaged("the vocabulary lacks pieces for bytes, or has others")


def _shown(value: KeyValue) -> str:
    return f"an array of {len(value.value)}" if value.array else repr(value.value)[:80]
