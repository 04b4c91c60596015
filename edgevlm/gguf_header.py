"""A GGUF file's head in plain Python: its metadata, and where its tensors lie.

llama.cpp ends the process on much that can stand there, so what it is to load is read here first
and looked at (gguf_decoder.py). Nothing is believed: every count, size and offset must lie within
the file. 257,216 tokens take about a tenth of a second.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt
from edgevlm.submodules import submodule

_VERSIONS = (2, 3)
_ALIGNMENT = 32
# More than any model has, and few enough to be read in no time.
_MOST_KEYS, _MOST_TENSORS, _MOST_TEXT = 4096, 65536, 1 << 20
_LONGEST_NAME, _MOST_DIMENSIONS, _MOST_ELEMENTS = 63, 4, 1 << 48
STRING, ARRAY = 8, 9
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", UINT32: "<u4", INT32: "<i4", FLOAT32: "<f4"},
    **{BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_gguf = submodule("gguf.constants")


@dataclass(frozen=True)
class KeyValue:
    """A value of the metadata: the type of it, or of the items of an array (`array`), and itself, a
    number, bytes of a text, a numpy array [n] or a list of texts.
    """

    type: int
    value: Any
    array: bool = False


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the head: ggml's name of its type, and its dimensions, the innermost first."""

    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The metadata by key and the tensors by name."""

    values: dict[str, KeyValue]
    tensors: dict[str, TensorEntry]


class Damaged(ValueError):
    """The head of a file is not what the format says; the message says what is wrong."""


def read_header(path: Path) -> Header:
    """Reads the head of a GGUF file; raises BundleCorrupt."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    # An empty file cannot be mapped.
    except (OSError, ValueError, struct.error) as e:
        problem = str(e) if isinstance(e, Damaged) else "is truncated"
        raise BundleCorrupt(path, f"not a GGUF file that can be read ({problem})") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise Damaged("no GGUF")
        version, n_tensors, n_keys = self._take("<IQQ")
        if version not in _VERSIONS:
            raise Damaged(f"version {version}")
        if n_keys > _MOST_KEYS or n_tensors > _MOST_TENSORS:
            raise Damaged(f"{n_keys} keys, {n_tensors} tensors")
        values: dict[str, KeyValue] = {}
        for _ in range(n_keys):
            key = self._name("a key")
            if key in values:
                raise Damaged(f"{key!r} is there twice")
            values[key] = self._value(key)
        alignment = values.get("general.alignment")
        if alignment and alignment != KeyValue(UINT32, _ALIGNMENT):
            raise Damaged(f"an alignment that is not {_ALIGNMENT}")
        return Header(values, self._tensors(n_tensors))

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _text(self) -> bytes:
        (size,) = self._take("<Q")
        begin, self._at = self._at, self._at + size
        if size > _MOST_TEXT or self._at > len(self._data):
            raise Damaged(f"a text of {size} bytes")
        return self._data[begin : self._at]

    def _name(self, what: str) -> str:
        name = self._text()
        try:
            text = name.decode()
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text or len(name) > 255:
            raise Damaged(f"{what} {name[:40]!r}")
        return text

    def _value(self, key: str) -> KeyValue:
        (kind,) = self._take("<I")
        if kind == STRING:
            return KeyValue(kind, self._text())
        if kind != ARRAY:
            return KeyValue(kind, self._numbers(kind, 1, key)[0].item())
        kind, n = self._take("<IQ")
        return KeyValue(
            kind, self._texts(n) if kind == STRING else self._numbers(kind, n, key), True
        )

    def _numbers(self, kind: int, n: int, key: str) -> npt.NDArray[Any]:
        if kind not in _NUMBERS:
            raise Damaged(f"{key!r} of the type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        begin, self._at = self._at, self._at + n * dtype.itemsize
        if self._at > len(self._data):
            raise Damaged(f"{key!r} of {n} numbers")
        return np.frombuffer(self._data[begin : self._at], dtype)

    def _texts(self, n: int) -> list[bytes]:
        """Texts one after the other; a vocabulary has hundreds of thousands."""
        data, at, end, unpack = (
            self._data,
            self._at,
            len(self._data),
            struct.Struct("<Q").unpack_from,
        )
        if n > (end - at) // 8:
            raise Damaged(f"{n} texts")
        found = []
        for _ in range(n):
            (size,) = unpack(data, at)
            begin = at + 8
            at = begin + size
            if size > _MOST_TEXT or at > end:
                raise Damaged(f"a text of {size} bytes")
            found.append(data[begin:at])
        self._at = at
        return found

    def _tensors(self, n: int) -> dict[str, TensorEntry]:
        found: dict[str, tuple[TensorEntry, int, int]] = {}
        for _ in range(n):
            name = self._name("a tensor's name")
            if name in found or len(name.encode()) > _LONGEST_NAME:
                raise Damaged(f"{name!r} is there twice or too long")
            found[name] = self._tensor(name)
        start = self._at + -self._at % _ALIGNMENT
        expected = 0
        for name, (_, offset, size) in found.items():
            # As llama.cpp wants them: one behind the other, in their order.
            if offset != expected or start + offset + size > len(self._data):
                raise Damaged(f"{name!r} lies outside of the file or of its place")
            expected += size + -size % _ALIGNMENT
        return {name: entry for name, (entry, _, _) in found.items()}

    def _tensor(self, name: str) -> tuple[TensorEntry, int, int]:
        """A tensor with its offset and its size in bytes."""
        (n,) = self._take("<I")
        if not 1 <= n <= _MOST_DIMENSIONS:
            raise Damaged(f"{name!r} of {n} dimensions")
        shape = self._take(f"<{n}Q")
        number, offset = self._take("<IQ")
        elements = 1
        for size in shape:
            elements *= size
        try:
            kind = _gguf.GGMLQuantizationType(number)
            block, n_bytes = _gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise Damaged(f"{name!r} of the type {number}") from None
        if not 0 < elements < _MOST_ELEMENTS or shape[0] % block:
            raise Damaged(f"{name!r} of the shape {list(shape)}")
        return TensorEntry(kind.name, shape), offset, elements // block * n_bytes
