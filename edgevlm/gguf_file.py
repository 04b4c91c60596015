"""What a decoder's GGUF file holds, read by ggml: gguf-py makes objects of every token, which takes
9 seconds for Phi-2's vocabulary, ggml 18 milliseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from llama_cpp._ctypes_extensions import load_shared_library

from edgevlm.errors import BundleCorrupt
from edgevlm.specs import DecoderSpec

BASE = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")


class _Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("shapes", ctypes.POINTER(c_void_p))]


def declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A C function of a library, with the types of its result and arguments."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_open = declare(BASE, "gguf_init_from_file", c_void_p, c_char_p, _Params)
_free = declare(BASE, "gguf_free", None, c_void_p)
_n_tensors = declare(BASE, "gguf_get_n_tensors", c_int64, c_void_p)
_tensor_name = declare(BASE, "gguf_get_tensor_name", c_char_p, c_void_p, c_int64)
_tensor_type = declare(BASE, "gguf_get_tensor_type", c_int, c_void_p, c_int64)
_tensor_size = declare(BASE, "gguf_get_tensor_size", c_size_t, c_void_p, c_int64)
_tensor_offset = declare(BASE, "gguf_get_tensor_offset", c_size_t, c_void_p, c_int64)
_data_offset = declare(BASE, "gguf_get_data_offset", c_size_t, c_void_p)
_find = declare(BASE, "gguf_find_key", c_int64, c_void_p, c_char_p)
_kv_type = declare(BASE, "gguf_get_kv_type", c_int, c_void_p, c_int64)
_u32 = declare(BASE, "gguf_get_val_u32", c_uint32, c_void_p, c_int64)
_f32 = declare(BASE, "gguf_get_val_f32", c_float, c_void_p, c_int64)
_array_type = declare(BASE, "gguf_get_arr_type", c_int, c_void_p, c_int64)
_array_size = declare(BASE, "gguf_get_arr_n", c_size_t, c_void_p, c_int64)
_array_data = declare(BASE, "gguf_get_arr_data", c_void_p, c_void_p, c_int64)
# The shapes are in tensors without data, in a context of ggml's own.
_shape = declare(BASE, "ggml_get_tensor", c_void_p, c_void_p, c_char_p)
_rows = declare(BASE, "ggml_nrows", c_int64, c_void_p)
_elements = declare(BASE, "ggml_nelements", c_int64, c_void_p)
_forget = declare(BASE, "ggml_free", None, c_void_p)
_UINT32, _FLOAT32, _ARRAY = 4, 6, 9


class StoredTensor(NamedTuple):
    """A tensor [rows, width] of a ggml type ("Q8_0"), at an offset in bytes from the beginning of
    the file; vectors have one row.
    """

    type: str
    rows: int
    width: int
    n_bytes: int
    offset: int

    @property
    def elements(self) -> int:
        """All values."""
        return self.rows * self.width


class Heads(NamedTuple):
    """A decoder's attention: query heads, key-value heads, values of a key and of a value."""

    query: int
    key_value: int
    key_size: int
    value_size: int


class GGUFFile:
    """An open file's tensors and metadata."""

    def __init__(self, path: Path, file: Any, shapes: c_void_p) -> None:
        self._path, self._file, self._shapes = path, file, shapes

    def tensors(self) -> dict[str, StoredTensor]:
        """All of them by name, in the order of the file."""
        return dict(self._tensor(i) for i in range(_n_tensors(self._file)))

    def _tensor(self, i: int) -> tuple[str, StoredTensor]:
        file, name = self._file, _tensor_name(self._file, i)
        shape = _shape(self._shapes, name)
        rows = max(1, int(_rows(shape)))
        return name.decode(), StoredTensor(
            GGMLQuantizationType(_tensor_type(file, i)).name,
            rows,
            int(_elements(shape)) // rows,
            int(_tensor_size(file, i)),
            int(_data_offset(file) + _tensor_offset(file, i)),
        )

    def number(self, key: str, default: int) -> int:
        """A whole number; the default where it is absent or of another type."""
        i = _find(self._file, key.encode())
        known = i >= 0 and _kv_type(self._file, i) == _UINT32
        return int(_u32(self._file, i)) if known else default

    def heads(self, spec: DecoderSpec) -> Heads:
        """What a file leaves out follows from the width, as in llama.cpp."""
        prefix = f"{spec.architecture}.attention."
        query = self.number(f"{prefix}head_count", 1)
        return Heads(
            query,
            self.number(f"{prefix}head_count_kv", query),
            self.number(f"{prefix}key_length", spec.n_embd // query),
            self.number(f"{prefix}value_length", spec.n_embd // query),
        )

    def floats(self, key: str) -> npt.NDArray[np.float32] | None:
        """A float number or array, float32 [n]; None where it is absent.

        Raises BundleCorrupt for a value of another type.
        """
        i = _find(self._file, key.encode())
        if i < 0:
            return None
        if _kv_type(self._file, i) == _FLOAT32:
            return np.array([_f32(self._file, i)], np.float32)
        if _kv_type(self._file, i) != _ARRAY or _array_type(self._file, i) != _FLOAT32:
            raise BundleCorrupt(self._path, f"{key!r} is not of float32 numbers")
        memory = (c_float * _array_size(self._file, i)).from_address(_array_data(self._file, i))
        return np.frombuffer(memory, np.float32).copy()


@contextmanager
def opened(path: Path) -> Iterator[GGUFFile]:
    """Opens a GGUF file; raises BundleCorrupt if it is none."""
    shapes = c_void_p()
    file = _open(str(path).encode(), _Params(True, ctypes.pointer(shapes)))
    if not file:
        raise BundleCorrupt(path, "is no GGUF file that llama.cpp can read")
    try:
        yield GGUFFile(path, file, shapes)
    finally:
        _free(file)
        _forget(shapes)
