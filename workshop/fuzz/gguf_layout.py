"""GGUF files taken apart and put together again, whatever nonsense stands in them.

Written from the format's description, apart from what edgevlm reads files with.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

STRING, ARRAY = 8, 9
NUMBERS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}


@dataclass
class Entry:
    """A key of the metadata; of an array `item` is the type of its items, `count` what the file
    says they are.
    """

    key: bytes
    type: int
    value: Any
    item: int = 0
    count: int = 0


@dataclass
class Info:
    """A tensor's name, dimensions, type and offset from the beginning of the data."""

    name: bytes
    dimensions: list[int]
    type: int
    offset: int


@dataclass
class Layout:
    """A file: its head as it is counted, its entries, its tensors, and all bytes after them."""

    magic: bytes
    version: int
    n_tensors: int
    n_entries: int
    entries: list[Entry]
    tensors: list[Info]
    data: bytes
    alignment: int = 32

    def packed(self) -> bytes:
        """The file."""
        out = bytearray(self.magic)
        out += struct.pack("<IQQ", self.version, self.n_tensors, self.n_entries)
        for entry in self.entries:
            out += _string(entry.key) + struct.pack("<I", entry.type)
            if entry.type == ARRAY:
                out += struct.pack("<IQ", entry.item, entry.count)
                for item in entry.value:
                    out += _value(entry.item, item)
            else:
                out += _value(entry.type, entry.value)
        for info in self.tensors:
            out += _string(info.name) + struct.pack("<I", len(info.dimensions))
            for size in info.dimensions:
                out += struct.pack("<Q", size % 2**64)
            out += struct.pack("<IQ", info.type, info.offset % 2**64)
        out += bytes(-len(out) % self.alignment)
        return bytes(out) + self.data


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return _string(value)
    if kind not in NUMBERS:
        return struct.pack("<q", int(value))
    if kind in (6, 12):
        return struct.pack(NUMBERS[kind], float(value))
    size = struct.calcsize(NUMBERS[kind])
    # By the modulus a negative number has the bits that it has in C.
    modulus: int = 1 << 8 * size
    return (int(value) % modulus).to_bytes(size, "little")


class Reader:
    """Reads a file that nothing is wrong with."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 4
        version, n_tensors, n_entries = (
            self._take("<I")[0],
            self._take("<Q")[0],
            self._take("<Q")[0],
        )
        entries = [self._entry() for _ in range(n_entries)]
        tensors = [self._info() for _ in range(n_tensors)]
        start = self._at + -self._at % 32
        self.layout = Layout(b"GGUF", version, n_tensors, n_entries, entries, tensors, data[start:])

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _text(self) -> bytes:
        (size,) = self._take("<Q")
        self._at += size
        return self._data[self._at - size : self._at]

    def _one(self, kind: int) -> Any:
        return self._text() if kind == STRING else self._take(NUMBERS[kind])[0]

    def _entry(self) -> Entry:
        key, (kind,) = self._text(), self._take("<I")
        if kind != ARRAY:
            return Entry(key, kind, self._one(kind))
        item, count = self._take("<I")[0], self._take("<Q")[0]
        return Entry(key, kind, [self._one(item) for _ in range(count)], item, count)

    def _info(self) -> Info:
        name, (n,) = self._text(), self._take("<I")
        dimensions = [self._take("<Q")[0] for _ in range(n)]
        kind, offset = self._take("<I")[0], self._take("<Q")[0]
        return Info(name, dimensions, kind, offset)
