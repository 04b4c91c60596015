"""A GGUF file of other files' tensors, or of some of their rows, written by ggml; every value stays
what it was, bit by bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgevlm.errors import ExportError
from edgevlm.gguf_file import GGUFFile, Library, StoredTensor
from edgevlm.progress import Stage
from edgevlm.submodules import submodule

Rows = npt.NDArray[np.int64]
# Values of metadata by key: numbers, texts, arrays of int32 or float32.
Metadata = Mapping[str, int | Sequence[str] | npt.NDArray[Any]]

_TYPES = submodule("gguf.constants").GGMLQuantizationType


class _Params(ctypes.Structure):
    _fields_ = [("memory", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


_ggml = Library(
    "ggml-base",
    gguf_init_empty=(c_void_p,),
    gguf_free=(None, c_void_p),
    gguf_set_kv=(None, c_void_p, c_void_p),
    gguf_set_val_u32=(None, c_void_p, c_char_p, c_uint32),
    gguf_set_arr_str=(None, c_void_p, c_char_p, c_void_p, c_size_t),
    gguf_set_arr_data=(None, c_void_p, c_char_p, c_int, c_void_p, c_size_t),
    gguf_get_alignment=(c_size_t, c_void_p),
    gguf_get_tensor_size=(c_size_t, c_void_p, c_int64),
    gguf_add_tensor=(None, c_void_p, c_void_p),
    gguf_write_to_file=(c_bool, c_void_p, c_char_p, c_bool),
    ggml_init=(c_void_p, _Params),
    ggml_free=(None, c_void_p),
    ggml_tensor_overhead=(c_size_t,),
    ggml_new_tensor=(c_void_p, c_void_p, c_int, c_int, c_void_p),
    ggml_set_name=(c_void_p, c_void_p, c_char_p),
)
# GGUF's numbers of types.
_ARRAYS = {np.dtype(np.int32): 5, np.dtype(np.float32): 6}
# Bytes that are copied at a time.
_CHUNK = 16 << 20


class Taken(NamedTuple):
    """A tensor of the file at `path`, or those `rows` of it; row -1 is one of zeros."""

    path: Path
    tensor: StoredTensor
    rows: Rows | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.tensor.rows if self.rows is None else len(self.rows)


def rewrite(
    target: Path, file: GGUFFile, changed: Metadata, tensors: Mapping[str, Taken], stage: Stage
) -> None:
    """Writes `target` with the metadata of an opened file, what is `changed` in place of its own,
    and these tensors in their order. The stage advances by their bytes.

    Raises ExportError or OSError where the disk is full.
    """
    with _writer() as writer, _shapes(len(tensors)) as shapes:
        _ggml.gguf_set_kv(writer, file.handle)
        for key, value in changed.items():
            _set(writer, key.encode(), value)
        for name, taken in tensors.items():
            _ggml.gguf_add_tensor(writer, _shape(shapes, name, taken))
        if not _ggml.gguf_write_to_file(writer, str(target).encode(), True):
            raise ExportError(f"{target.name}: ggml could not write it; make room on the disk")
        alignment = _ggml.gguf_get_alignment(writer)
        with target.open("ab") as out:
            for taken in tensors.values():
                for part in _parts(taken):
                    out.write(part.data)
                    stage.advance(part.nbytes)
                out.write(b"\0" * (-out.tell() % alignment))


@contextmanager
def _writer() -> Iterator[Any]:
    writer = _ggml.gguf_init_empty()
    try:
        yield writer
    finally:
        _ggml.gguf_free(writer)


@contextmanager
def _shapes(n: int) -> Iterator[Any]:
    """A place for the shapes of n tensors without data."""
    shapes = _ggml.ggml_init(_Params((n + 1) * _ggml.ggml_tensor_overhead(), None, True))
    try:
        yield shapes
    finally:
        _ggml.ggml_free(shapes)


def _shape(shapes: Any, name: str, taken: Taken) -> Any:
    width, rows = taken.tensor.width, taken.n_rows
    size = (width, rows) if rows > 1 else (width,)
    sides, kind = (c_int64 * len(size))(*size), _TYPES[taken.tensor.type].value
    made = _ggml.ggml_new_tensor(shapes, kind, len(size), sides)
    return _ggml.ggml_set_name(made, name.encode())


def _set(writer: Any, key: bytes, value: int | Sequence[str] | npt.NDArray[Any]) -> None:
    if isinstance(value, int):
        _ggml.gguf_set_val_u32(writer, key, value)
    elif isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        kind, start = _ARRAYS[data.dtype], data.ctypes.data_as(c_void_p)
        _ggml.gguf_set_arr_data(writer, key, kind, start, len(data))
    else:
        texts = (c_char_p * len(value))(*(text.encode() for text in value))
        _ggml.gguf_set_arr_str(writer, key, ctypes.cast(texts, c_void_p), len(value))


def _parts(taken: Taken) -> Iterable[npt.NDArray[np.uint8]]:
    tensor, rows = taken.tensor, taken.rows
    shape = (tensor.rows, tensor.n_bytes // tensor.rows)
    data = np.memmap(taken.path, np.uint8, "r", tensor.offset, shape)
    step = max(1, _CHUNK // shape[1])
    for start in range(0, taken.n_rows, step):
        if rows is None:
            yield np.ascontiguousarray(data[start : start + step])
            continue
        wanted = rows[start : start + step]
        part = data[wanted]
        part[wanted < 0] = 0
        yield part
