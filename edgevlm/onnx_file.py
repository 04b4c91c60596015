"""An ONNX file, looked at before onnxruntime opens it.

A graph may name files from which onnxruntime reads weights, operators of libraries, and sizes
beyond any memory. What an export never writes is refused here: weights anywhere but in the graph
and in files that the bundle lists, operators of other domains, graphs in graphs. Only what these
rules are about is read of the file, in milliseconds however large it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleCorrupt

_DOMAINS = ("", "ai.onnx")
# What exports take of another domain: weights in four bits, attention without scores in memory, and
# quantizers' fusions of ONNX's own.
_MICROSOFT = "com.microsoft"
_FUSED = (
    *("MatMulNBits", "MultiHeadAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QGemm", "FusedMatMul"),
    *("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "QLinearAdd", "QLinearMul", "QLinearConcat"),
)
# Bits of a value by ONNX's number of its type; texts and what is not listed have none.
_BITS = {
    **{1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64},
    **{16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
_MOST_VALUES = 1 << 40

Field = tuple[int, int, Any]


class _Wrong(ValueError):
    """The message says what is wrong with a file."""


def check_graph(path: Path, beside: Collection[str]) -> None:
    """Raises BundleCorrupt for a file that reads others than those `beside` it, or that holds what
    no export writes.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Checker(path, data, beside).model()
    # An empty file cannot be mapped.
    except (OSError, ValueError) as e:
        problem = str(e) if isinstance(e, _Wrong) else "it is damaged"
        raise BundleCorrupt(path, f"is not a graph that can be loaded ({problem})") from None


class _Checker:
    def __init__(self, path: Path, data: mmap.mmap, beside: Collection[str]) -> None:
        self._path, self._data, self._beside = path, data, beside

    def model(self) -> None:
        """ModelProto: 7 is its graph, 20 what trains it, 25 functions of its own."""
        graphs = 0
        for number, _, span in self._fields((0, len(self._data))):
            if number == 7:
                graphs += 1
                self._graph(span)
            elif number in (20, 25):
                raise _Wrong("it has functions or training of its own")
        if not graphs:
            raise _Wrong("no graph in it")

    def _graph(self, span: Any) -> None:
        """GraphProto: 1 is a node, 5 a tensor, 12 an output, 15 a sparse tensor."""
        outputs = 0
        read: dict[int, Callable[[Any], None]] = {1: self._node, 5: self._tensor}
        for number, _, value in self._fields(span):
            if number == 15:
                raise _Wrong("it has sparse tensors")
            outputs += number == 12
            if number in read:
                read[number](value)
        if outputs != 1:
            raise _Wrong(f"{outputs} outputs instead of one")

    def _node(self, span: Any) -> None:
        """NodeProto: 4 is the operator, 5 an attribute, 7 the operator's domain."""
        operator = domain = ""
        for number, _, value in self._fields(span):
            if number == 4:
                operator = self._text(value)
            elif number == 7:
                domain = self._text(value)
            elif number == 5:
                self._attribute(value)
        if domain not in _DOMAINS and not (domain == _MICROSOFT and operator in _FUSED):
            raise _Wrong(f"the operator {operator[:40]!r} of {domain[:40]!r}")

    def _attribute(self, span: Any) -> None:
        """AttributeProto: 5 and 10 are tensors, 6 and 11 graphs, 22 and 23 sparse tensors."""
        for number, _, value in self._fields(span):
            if number in (6, 11, 22, 23):
                raise _Wrong("a graph or a sparse tensor in a node")
            if number in (5, 10):
                self._tensor(value)

    def _tensor(self, span: Any) -> None:
        """TensorProto: 1 is its shape, 2 its type, 4, 5, 7, 10 and 11 its values by their type, 9
        all of them as bytes, 13 says where they lie, if 14 says so.
        """
        values, kind, n_bytes, elsewhere = 1, 0, 0, False
        entries = []
        for number, wire, value in self._fields(span):
            if number == 1:
                for size in self._numbers(wire, value):
                    if size > _MOST_VALUES or (values := values * size) > _MOST_VALUES:
                        raise _Wrong("a tensor larger than any memory")
            elif number == 2:
                kind = value
            elif number in (4, 5, 7, 9, 10, 11):
                n_bytes += value[1] - value[0] if wire == _BYTES else 1
            elif number == 13:
                entries.append(value)
            elif number == 14:
                elsewhere = value == _EXTERNAL
        if kind not in _BITS:
            raise _Wrong(f"a tensor of the type {kind}")
        size = (values * _BITS[kind] + 7) // 8
        if elsewhere:
            self._elsewhere(entries, size)
        elif entries or values > n_bytes * 2:
            # Two values of four bits are a byte, and every other takes one or more.
            raise _Wrong(f"a tensor of {values} values in {n_bytes} bytes")

    def _elsewhere(self, entries: list[Any], size: int) -> None:
        """StringStringEntryProto: 1 is a key, 2 its value."""
        said: dict[str, str] = {}
        for entry in entries:
            pair = {number: self._text(value) for number, _, value in self._fields(entry)}
            said[pair.get(1, "")] = pair.get(2, "")
        name = said.pop("location", "")
        if name not in self._beside or Path(name).name != name:
            raise _Wrong(f"weights in {name[:80]!r}, which is not a file of this bundle")
        said.pop("checksum", None)
        offset, length = said.pop("offset", "0"), said.pop("length", str(size))
        if said or not all(n.isascii() and n.isdecimal() and len(n) < 16 for n in (offset, length)):
            raise _Wrong(f"odd words about weights in {name!r}")
        if int(length) != size or int(offset) + size > (self._path.parent / name).stat().st_size:
            raise _Wrong(f"weights that are not within {name!r}")

    def _text(self, span: Any) -> str:
        if not isinstance(span, tuple):
            raise _Wrong("a number where a text must be")
        return self._data[span[0] : span[1]].decode()

    def _numbers(self, wire: int, value: Any) -> Iterator[int]:
        """One number, or several in a row."""
        if wire != _BYTES:
            yield value
            return
        at, end = value
        while at < end:
            number, at = self._varint(at, end)
            yield number

    def _fields(self, span: Any) -> Iterator[Field]:
        """The fields of a message: number, kind on the wire, and value: a number, or the span of
        bytes.
        """
        if not isinstance(span, tuple):
            raise _Wrong("a number where a message must be")
        at, end = span
        while at < end:
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            value: Any
            if wire == _VARINT:
                value, at = self._varint(at, end)
            elif wire == _BYTES:
                size, at = self._varint(at, end)
                value, at = (at, at + size), at + size
            elif wire in (_FIXED32, _FIXED64):
                value, at = 0, at + (4 if wire == _FIXED32 else 8)
            else:
                raise _Wrong("a field of an unknown kind")
            if at > end:
                raise _Wrong("it is truncated")
            yield number, wire, value

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for i in range(10):
            if at + i >= end:
                break
            byte = self._data[at + i]
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, at + i + 1
        raise _Wrong("it is truncated")
