"""Shapes of a tokenizer's JSON files, checked when they are read: who reads a key finds what it
expects there.

A shape is a type, None, a list of one shape, a mapping of keys to shapes, a tuple of shapes of
which one must fit, or a test. In a mapping "*" is every key that is not named, and a key that ends
in "!" must be there.
"""

from __future__ import annotations

from typing import Any

_MOST_TOKENS = 1 << 24


def _id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_TOKENS


def _step(value: Any) -> bool:
    """True for a step of a tokenizer, or a sequence of steps."""
    return not _wrong(value, (None, _STEP), "")


def _model(value: Any) -> bool:
    """True for a BPE tokenizer's model; others are refused by whoever knows which there are."""
    kind = value.get("type") if isinstance(value, dict) else value
    return kind != "BPE" and isinstance(value, dict) or not _wrong(value, _BPE, "")


_BPE = {"type!": str, "vocab!": {"*": _id}, "merges!": [(str, [str])]}
_TOKEN = (None, str, {"content!": str})
_ADDED = {"content!": str}
_EXTRA = (None, [_TOKEN], {"*": _TOKEN})
_STEP = {
    "type!": str,
    "pattern": {"Regex": str, "String": str},
    "normalizers": [_step],
    "pretokenizers": [_step],
    "processors": [_step],
    "single": [dict],
}
SHAPES: dict[str, Any] = {
    "added_tokens.json": {"*": _id},
    "tokenizer.json": {
        "added_tokens": (None, [{"id!": _id, **_ADDED}]),
        "model": _model,
        "normalizer": _step,
        "pre_tokenizer": _step,
        "post_processor": _step,
    },
    "tokenizer_config.json": {
        "add_bos_token": (None, bool),
        "added_tokens_decoder": {"*": _ADDED},
        "additional_special_tokens": _EXTRA,
        "extra_special_tokens": _EXTRA,
        "model_specific_special_tokens": _EXTRA,
        "tokenizer_class": (None, str),
        **{f"{role}_token": _TOKEN for role in ("bos", "eos", "unk", "pad")},
    },
    "vocab.json": {"*": _id},
}


def check(name: str, data: Any) -> None:
    """Raises ValueError, which names the place, where a file of this name has another shape."""
    if name in SHAPES and (place := _wrong(data, SHAPES[name], "")):
        raise ValueError(f"{place} has the wrong value or is missing")
    for key in data.get("added_tokens_decoder", ()) if name == "tokenizer_config.json" else ():
        if not key.isdecimal() or not _id(int(key[:9])):
            raise ValueError(f"added_tokens_decoder.{key[:20]!r} is not an id")


def _wrong(value: Any, shape: Any, place: str) -> str:
    """The first place in a value that does not fit, "" where all of it does."""
    if isinstance(shape, tuple):
        found = [_wrong(value, each, place) for each in shape]
        return "" if "" in found else max(found, key=len)
    if isinstance(shape, list) and isinstance(value, list):
        places = (_wrong(v, shape[0], f"{place}[{i}]") for i, v in enumerate(value))
        return next(filter(None, places), "")
    if isinstance(shape, dict) and isinstance(value, dict):
        return _wrong_key(value, shape, place)
    if shape is None or isinstance(shape, type):
        fits = value is None if shape is None else isinstance(value, shape)
    else:
        fits = callable(shape) and shape(value)
    return "" if fits else place or "the file"


def _wrong_key(value: dict[str, Any], shape: dict[str, Any], place: str) -> str:
    shapes = {key.removesuffix("!"): each for key, each in shape.items()}
    for key in shape:
        if key.endswith("!") and key[:-1] not in value:
            return f"{place}.{key[:-1]}".lstrip(".")
    for key, each in value.items():
        expected = shapes.get(key, shapes.get("*"))
        shown = f"{place}.{key[:40]}".lstrip(".")
        if (expected is not None or key in shapes) and (wrong := _wrong(each, expected, shown)):
            return wrong
    return ""
