"""Tensors and metadata of a GGUF file, read by ggml.

gguf-py makes objects of every token, which takes 9 seconds for Phi-2's vocabulary, ggml 18
milliseconds. Neither ggml nor llama_cpp is loaded before the first file is opened.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt, EngineMissing
from edgevlm.specs import DecoderSpec
from edgevlm.submodules import submodule

# Metadata of a trimmed decoder: the ids of the tokens that its rows stand for, ascending.
KEPT = "edgevlm.kept_tokens"

Number = TypeVar("Number", bound=np.generic)

_TYPES = submodule("gguf.constants").GGMLQuantizationType


class Library:
    """A library of llama-cpp-python's wheel, loaded when the first of its functions is called.

    `functions` are its C functions by name: the type of the result, then those of the arguments.
    They are called as methods. Raises EngineMissing where the wheel or the library is not there.
    """

    def __init__(self, name: str, **functions: tuple[Any, ...]) -> None:
        self._name, self._functions = name, functions
        self._loaded: ctypes.CDLL | None = None

    @property
    def folder(self) -> Path:
        """The folder of the wheel's libraries; raises as the class says."""
        return _path(self._name).parent

    def __getattr__(self, name: str) -> Any:
        if name not in self._functions:
            raise AttributeError(f"{name} is not declared of {self._name}")
        self._loaded = self._loaded or ctypes.CDLL(str(_path(self._name)))
        function = getattr(self._loaded, name)
        function.restype, *function.argtypes = self._functions[name]
        setattr(self, name, function)  # from now on it is found without this method
        return function


def _path(name: str) -> Path:
    """The file of a library; it lies beside llama_cpp's Python, which is found without an import:
    llama_cpp's own loader is private, and libllama's handle finds ggml's functions on POSIX alone.
    """
    spec = find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    names = {
        "win32": (f"{name}.dll", f"lib{name}.dll"),
        "darwin": (f"lib{name}.dylib", f"lib{name}.so"),
    }.get(sys.platform, (f"lib{name}.so",))
    found = next((path for n in names if (path := folder / n).is_file()), None)
    if not spec or not found:
        raise EngineMissing(f"{names[0]} of llama.cpp is missing", "pip install llama-cpp-python")
    return found


class _Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("shapes", ctypes.POINTER(c_void_p))]


_ggml = Library(
    "ggml-base",
    gguf_init_from_file=(c_void_p, c_char_p, _Params),
    gguf_free=(None, c_void_p),
    gguf_get_n_tensors=(c_int64, c_void_p),
    gguf_get_tensor_name=(c_char_p, c_void_p, c_int64),
    gguf_get_tensor_type=(c_int, c_void_p, c_int64),
    gguf_get_tensor_size=(c_size_t, c_void_p, c_int64),
    gguf_get_tensor_offset=(c_size_t, c_void_p, c_int64),
    gguf_get_data_offset=(c_size_t, c_void_p),
    gguf_get_n_kv=(c_int64, c_void_p),
    gguf_get_key=(c_char_p, c_void_p, c_int64),
    gguf_find_key=(c_int64, c_void_p, c_char_p),
    gguf_get_kv_type=(c_int, c_void_p, c_int64),
    gguf_get_val_u32=(c_uint32, c_void_p, c_int64),
    gguf_get_val_f32=(c_float, c_void_p, c_int64),
    gguf_get_val_str=(c_char_p, c_void_p, c_int64),
    gguf_get_arr_type=(c_int, c_void_p, c_int64),
    gguf_get_arr_n=(c_size_t, c_void_p, c_int64),
    gguf_get_arr_data=(c_void_p, c_void_p, c_int64),
    gguf_get_arr_str=(c_char_p, c_void_p, c_int64, c_size_t),
    # The shapes are in tensors without data, in a context of ggml's own.
    ggml_get_tensor=(c_void_p, c_void_p, c_char_p),
    ggml_nrows=(c_int64, c_void_p),
    ggml_nelements=(c_int64, c_void_p),
    ggml_free=(None, c_void_p),
)
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9


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

    @property
    def handle(self) -> Any:
        """ggml's own object, for its functions."""
        return self._file

    def keys(self) -> list[str]:
        """All keys of the metadata, in the order of the file."""
        n = _ggml.gguf_get_n_kv(self._file)
        return [_decoded(_ggml.gguf_get_key(self._file, i)) for i in range(n)]

    def tensors(self) -> dict[str, StoredTensor]:
        """All of them by name, in the order of the file."""
        return dict(self._tensor(i) for i in range(_ggml.gguf_get_n_tensors(self._file)))

    def _tensor(self, i: int) -> tuple[str, StoredTensor]:
        file, name = self._file, _ggml.gguf_get_tensor_name(self._file, i)
        shape = _ggml.ggml_get_tensor(self._shapes, name)
        rows = max(1, int(_ggml.ggml_nrows(shape)))
        return name.decode(), StoredTensor(
            _TYPES(_ggml.gguf_get_tensor_type(file, i)).name,
            rows,
            int(_ggml.ggml_nelements(shape)) // rows,
            int(_ggml.gguf_get_tensor_size(file, i)),
            int(_ggml.gguf_get_data_offset(file) + _ggml.gguf_get_tensor_offset(file, i)),
        )

    def number(self, key: str, default: int) -> int:
        """A whole number; the default where it is absent or of another type."""
        i = _ggml.gguf_find_key(self._file, key.encode())
        known = i >= 0 and _ggml.gguf_get_kv_type(self._file, i) == _UINT32
        return int(_ggml.gguf_get_val_u32(self._file, i)) if known else default

    def text(self, key: str) -> str:
        """A text; empty where it is absent or of another type."""
        i = _ggml.gguf_find_key(self._file, key.encode())
        known = i >= 0 and _ggml.gguf_get_kv_type(self._file, i) == _STRING
        return _decoded(_ggml.gguf_get_val_str(self._file, i)) if known else ""

    def texts(self, key: str) -> list[str]:
        """An array of texts; empty where it is absent or of another type."""
        i = _ggml.gguf_find_key(self._file, key.encode())
        if i < 0 or _ggml.gguf_get_kv_type(self._file, i) != _ARRAY:
            return []
        if _ggml.gguf_get_arr_type(self._file, i) != _STRING:
            return []
        n = _ggml.gguf_get_arr_n(self._file, i)
        return [_decoded(_ggml.gguf_get_arr_str(self._file, i, k)) for k in range(n)]

    def heads(self, spec: DecoderSpec) -> Heads:
        """Attention heads; what a file leaves out follows from the width, as in llama.cpp."""
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
        i = _ggml.gguf_find_key(self._file, key.encode())
        if i < 0:
            return None
        if _ggml.gguf_get_kv_type(self._file, i) == _FLOAT32:
            return np.array([_ggml.gguf_get_val_f32(self._file, i)], np.float32)
        return self._array(i, key, _FLOAT32, np.float32, "float32 numbers")

    def integers(self, key: str) -> npt.NDArray[np.int32] | None:
        """An array of whole numbers, int32 [n]; None where it is absent.

        Raises BundleCorrupt for a value of another type.
        """
        i = _ggml.gguf_find_key(self._file, key.encode())
        return None if i < 0 else self._array(i, key, _INT32, np.int32, "int32 numbers")

    def _array(
        self, i: int, key: str, kind: int, dtype: type[Number], of: str
    ) -> npt.NDArray[Number]:
        array = _ggml.gguf_get_kv_type(self._file, i) == _ARRAY
        if not array or _ggml.gguf_get_arr_type(self._file, i) != kind:
            raise BundleCorrupt(self._path, f"{key!r} is not of {of}")
        n, start = _ggml.gguf_get_arr_n(self._file, i), _ggml.gguf_get_arr_data(self._file, i)
        # Of an empty array there may be no address.
        size = n * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(start, size) if n else b"", dtype).copy()


def _decoded(text: bytes) -> str:
    return text.decode(errors="replace")


@contextmanager
def opened(path: Path) -> Iterator[GGUFFile]:
    """Opens a GGUF file; raises BundleCorrupt if it is none."""
    shapes = c_void_p()
    file = _ggml.gguf_init_from_file(str(path).encode(), _Params(True, ctypes.pointer(shapes)))
    if not file:
        raise BundleCorrupt(path, "is not a GGUF file that llama.cpp can read")
    try:
        yield GGUFFile(path, file, shapes)
    finally:
        _ggml.gguf_free(file)
        _ggml.ggml_free(shapes)
