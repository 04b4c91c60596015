"""What llama.cpp offers, what it says, and what a decoder's file holds, by ggml's C API."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._ctypes_extensions import load_shared_library

from edgevlm.errors import BundleCorrupt, EngineError
from edgevlm.runtimes.backends import LayerBytes, LlamaDevice, backend
from edgevlm.specs import DecoderSpec

# enum ggml_backend_dev_type; accelerators such as BLAS (3) work on the CPU's tensors.
_GPU, _IGPU = 1, 2
# enum ggml_log_level.
_WARN = 3
# Rows of a picture and a question in one batch, for the size of intermediate results.
_BATCH_ROWS = 512
_SCORED_ROWS = 16

_folder = Path(llama_cpp.__file__).parent / "lib"
BASE = load_shared_library("ggml-base", _folder)
_registry = load_shared_library("ggml", _folder)


class _GGUFParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", c_void_p)]


def declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A C function of a library, with the types of its result and arguments."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_count = declare(_registry, "ggml_backend_dev_count", c_size_t)
_get = declare(_registry, "ggml_backend_dev_get", c_void_p, c_size_t)
_name = declare(BASE, "ggml_backend_dev_name", c_char_p, c_void_p)
_description = declare(BASE, "ggml_backend_dev_description", c_char_p, c_void_p)
_type = declare(BASE, "ggml_backend_dev_type", c_int, c_void_p)
_size = ctypes.POINTER(c_size_t)
_memory = declare(BASE, "ggml_backend_dev_memory", None, c_void_p, _size, _size)
_reg = declare(BASE, "ggml_backend_dev_backend_reg", c_void_p, c_void_p)
_reg_name = declare(BASE, "ggml_backend_reg_name", c_char_p, c_void_p)
_open = declare(BASE, "gguf_init_from_file", c_void_p, c_char_p, _GGUFParams)
_free = declare(BASE, "gguf_free", None, c_void_p)
_n_tensors = declare(BASE, "gguf_get_n_tensors", c_int64, c_void_p)
_tensor_name = declare(BASE, "gguf_get_tensor_name", c_char_p, c_void_p, c_int64)
_tensor_size = declare(BASE, "gguf_get_tensor_size", c_size_t, c_void_p, c_int64)
_find = declare(BASE, "gguf_find_key", c_int64, c_void_p, c_char_p)
_kv_type = declare(BASE, "gguf_get_kv_type", c_int, c_void_p, c_int64)
_u32 = declare(BASE, "gguf_get_val_u32", c_uint32, c_void_p, c_int64)
_f32 = declare(BASE, "gguf_get_val_f32", c_float, c_void_p, c_int64)
_array_type = declare(BASE, "gguf_get_arr_type", c_int, c_void_p, c_int64)
_array_size = declare(BASE, "gguf_get_arr_n", c_size_t, c_void_p, c_int64)
_array_data = declare(BASE, "gguf_get_arr_data", c_void_p, c_void_p, c_int64)
_GGUF_UINT32, _GGUF_FLOAT32, _GGUF_ARRAY = 4, 6, 9
# Values of a block of q8_0, which share a scale.
_Q8_BLOCK = 32


# The last warnings and errors, for the message of the next error; never printed.
log: list[str] = []
# Layers that the last model loaded has on a device, of how many: llama.cpp says so in its log only.
_layers = [0, 0]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _: object) -> None:
    if level >= _WARN:
        log.append(text.decode("utf-8", "replace").strip())
        del log[:-20]
    elif match := re.search(rb"offloaded (\d+)/(\d+) layers", text):
        _layers[:] = map(int, match.groups())


def quiet() -> None:
    """Keeps what llama.cpp says to itself and forgets what it said before."""
    llama_cpp.llama_log_set(_collect, None)
    log.clear()
    _layers[:] = 0, 0


def last_log() -> str:
    """The last thing that llama.cpp complained about."""
    return next((line for line in reversed(log) if line), "no reason given")


def offloaded() -> tuple[int, int]:
    """Layers that the last model loaded since `quiet` has on a device, and of how many."""
    return _layers[0], _layers[1]


def devices() -> list[LlamaDevice]:
    """The devices beside the CPU that this build of llama.cpp offers here."""
    quiet()
    found = []
    for i in range(_count()):
        handle = _get(i)
        if _type(handle) not in (_GPU, _IGPU):
            continue
        registry = _reg_name(_reg(handle)).decode()
        free, total = c_size_t(), c_size_t()
        _memory(handle, free, total)
        name, description = _name(handle).decode(), _description(handle).decode()
        found.append(
            LlamaDevice(name, description, backend(registry), free.value, total.value, handle)
        )
    return found


def check_heads(path: Path, spec: DecoderSpec) -> None:
    """Raises EngineError where a decoder's heads do not divide into the blocks of a q8_0 cache;
    llama.cpp says so only with the first question.
    """
    with _opened(path) as file:
        heads = _number(file, spec, "attention.head_count", 1)
        for part in ("key", "value"):
            size = _number(file, spec, f"attention.{part}_length", spec.n_embd // heads)
            if size % _Q8_BLOCK:
                raise EngineError(
                    f"a q8_0 cache needs heads of a multiple of {_Q8_BLOCK} values and this "
                    f"decoder's have {size}; use f16"
                )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A GGUF file's metadata, parsed by ggml: gguf-py would make an object of every token, which
    takes 9 seconds for Phi-2's vocabulary, ggml 18 milliseconds.
    """
    file = _open(str(path).encode(), _GGUFParams(True, None))
    if not file:
        raise BundleCorrupt(path, "is no GGUF file that llama.cpp can read")
    try:
        yield file
    finally:
        _free(file)


def read_floats(path: Path, keys: Iterable[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Float arrays and numbers in a GGUF's metadata, float32 [n] each; absent keys are left out.

    Raises BundleCorrupt for a file that is no GGUF and for a value of another type.
    """
    with _opened(path) as file:
        ids = {key: _find(file, key.encode()) for key in keys}
        return {key: _floats(file, i, path, key) for key, i in ids.items() if i >= 0}


def _floats(file: Any, i: int, path: Path, key: str) -> npt.NDArray[np.float32]:
    if _kv_type(file, i) == _GGUF_FLOAT32:
        return np.array([_f32(file, i)], np.float32)
    if _kv_type(file, i) != _GGUF_ARRAY or _array_type(file, i) != _GGUF_FLOAT32:
        raise BundleCorrupt(path, f"{key!r} is not of float32 numbers")
    memory = (c_float * _array_size(file, i)).from_address(_array_data(file, i))
    return np.frombuffer(memory, np.float32).copy()


def _number(file: Any, spec: DecoderSpec, name: str, default: int) -> int:
    key = _find(file, f"{spec.architecture}.{name}".encode())
    known = key >= 0 and _kv_type(file, key) == _GGUF_UINT32
    return int(_u32(file, key)) if known else default


def layer_bytes(path: Path, spec: DecoderSpec, exact: bool) -> LayerBytes:
    """What the parts of the decoder in a GGUF file need on a device.

    `exact` keeps the state in float32, otherwise float16. Raises BundleCorrupt if it is no GGUF.
    """
    with _opened(path) as file:
        names = [_tensor_name(file, i).decode() for i in range(_n_tensors(file))]
        sizes = {name: int(_tensor_size(file, i)) for i, name in enumerate(names)}
        heads = _number(file, spec, "attention.head_count", 1)
        head = _number(file, spec, "attention.key_length", spec.n_embd // heads)
        state = 2 * _number(file, spec, "attention.head_count_kv", heads) * head
        inner = _number(file, spec, "feed_forward_length", 4 * spec.n_embd)
    layers = [0] * spec.n_layer
    for name, size in sizes.items():
        if match := re.match(r"blk\.(\d+)\.", name):
            layers[int(match[1])] += size
    output = sizes.get("output.weight", sizes.get("token_embd.weight", 0))
    # Three rows of the feed-forward's width, four of the model's, and the logits, in float32.
    work = 4 * (_BATCH_ROWS * (3 * inner + 4 * spec.n_embd) + _SCORED_ROWS * spec.n_vocab)
    return LayerBytes(tuple(layers), output, state * (4 if exact else 2), work)
