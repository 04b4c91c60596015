"""llama.cpp's devices, features and log, and a decoder's memory needs, by ggml's C API."""

from __future__ import annotations

import ctypes
import re
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from importlib.metadata import version
from pathlib import Path

from edgevlm.errors import BundleCorrupt, EngineError, EngineMissing
from edgevlm.gguf_file import Library, opened
from edgevlm.runtimes.llama.backends import LayerBytes, LlamaDevice, backend
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.memory import was_refused
from edgevlm.specs import DecoderSpec
from edgevlm.types import FlashAttention

# enum ggml_backend_dev_type; accelerators such as BLAS (3) work on the CPU's tensors.
_GPU, _IGPU = 1, 2
# enum ggml_log_level.
_WARN = 3
# Rows of a picture and a question in one batch, for the size of intermediate results.
_BATCH_ROWS = 512
_SCORED_ROWS = 16

_registry = Library(
    "ggml",
    ggml_backend_dev_count=(c_size_t,),
    ggml_backend_dev_get=(c_void_p, c_size_t),
    ggml_backend_reg_count=(c_size_t,),
    ggml_backend_load_all_from_path=(None, c_char_p),
)
_size = ctypes.POINTER(c_size_t)
_base = Library(
    "ggml-base",
    ggml_backend_dev_name=(c_char_p, c_void_p),
    ggml_backend_dev_description=(c_char_p, c_void_p),
    ggml_backend_dev_type=(c_int, c_void_p),
    ggml_backend_dev_memory=(None, c_void_p, _size, _size),
    ggml_backend_dev_backend_reg=(c_void_p, c_void_p),
    ggml_backend_reg_name=(c_char_p, c_void_p),
    ggml_version=(c_char_p,),
    ggml_commit=(c_char_p,),
)
# Values of a block of q8_0, which share a scale.
_Q8_BLOCK = 32


# The last warnings and errors, for the message of the next error; never printed.
log: list[str] = []
# Layers that the last model loaded has on a device, of how many, and whether the last context has
# flash attention: llama.cpp says so in its log only.
_layers = [0, 0]
_flash_attention = [b""]


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _: object) -> None:
    if level >= _WARN:
        log.append(text.decode("utf-8", "replace").strip())
        del log[:-20]
    elif match := re.search(rb"offloaded (\d+)/(\d+) layers", text):
        _layers[:] = map(int, match.groups())
    elif match := re.search(rb"Flash Attention.* (enabled|disabled)", text):
        _flash_attention[0] = match[1]


def start() -> None:
    """Makes llama.cpp ready, with the back ends of its wheel.

    Where the wheel has one for every generation of processors the best for this one is loaded, from
    the wheel's folder: llama.cpp itself looks beside Python and in the current folder, where
    anybody's file may lie. Raises EngineMissing where none runs here.
    """
    quiet()  # it says on stderr what it loads
    if not _registry.ggml_backend_reg_count():
        _registry.ggml_backend_load_all_from_path(str(_registry.folder).encode())
    if not _registry.ggml_backend_reg_count():
        raise EngineMissing(
            f"{_registry.folder}: none of llama.cpp's back ends runs on this processor",
            "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python",
        )
    llama.llama_backend_init()


def quiet() -> None:
    """Keeps what llama.cpp says to itself and forgets what it said before."""
    llama.llama_log_set(_collect, None)
    log.clear()
    _layers[:] = 0, 0


def last_log() -> str:
    """The last thing that llama.cpp complained about."""
    return next((line for line in reversed(log) if line), "no reason given")


def was_refused_memory() -> bool:
    """True if llama.cpp complained that it got no memory."""
    return any(map(was_refused, log))


def offloaded() -> tuple[int, int]:
    """Layers that the last model loaded since `quiet` has on a device, and of how many."""
    return _layers[0], _layers[1]


def flash_attention() -> FlashAttention:
    """llama.cpp's choice for the last context that left it one; "auto" if it did not say."""
    found: dict[bytes, FlashAttention] = {b"enabled": "on", b"disabled": "off"}
    return found.get(_flash_attention[0], "auto")


def cpu_features() -> list[str]:
    """Processor features that this build of llama.cpp uses, such as AVX2."""
    start()
    found: list[bytes] = re.findall(rb"(\w+) = 1", llama.llama_print_system_info())
    return [name.decode() for name in found]


def build() -> str:
    """The build of llama.cpp: the package's version, ggml's, and the commit."""
    package = version("llama-cpp-python")
    return f"{package} {_base.ggml_version().decode()} {_base.ggml_commit().decode()}"


def devices() -> list[LlamaDevice]:
    """The devices beside the CPU that this build of llama.cpp offers here."""
    start()
    found = []
    for i in range(_registry.ggml_backend_dev_count()):
        handle = _registry.ggml_backend_dev_get(i)
        if _base.ggml_backend_dev_type(handle) not in (_GPU, _IGPU):
            continue
        registry = _base.ggml_backend_reg_name(_base.ggml_backend_dev_backend_reg(handle)).decode()
        free, total = c_size_t(), c_size_t()
        _base.ggml_backend_dev_memory(handle, free, total)
        name = _base.ggml_backend_dev_name(handle).decode()
        description = _base.ggml_backend_dev_description(handle).decode()
        found.append(
            LlamaDevice(name, description, backend(registry), free.value, total.value, handle)
        )
    return found


def check_heads(path: Path, spec: DecoderSpec) -> None:
    """Raises EngineError where a decoder's heads do not divide into the blocks of a q8_0 cache;
    llama.cpp says so only with the first question.
    """
    with opened(path) as file:
        heads = file.heads(spec)
    for size in (heads.key_size, heads.value_size):
        if size % _Q8_BLOCK:
            raise EngineError(
                f"a q8_0 cache needs heads of a multiple of {_Q8_BLOCK} values and this "
                f"decoder's have {size}; use f16"
            )


def layer_bytes(path: Path, spec: DecoderSpec, exact: bool) -> LayerBytes:
    """Memory that the decoder in a GGUF file needs on a device.

    `exact` keeps the KV cache in float32, otherwise float16. Raises BundleCorrupt if it is
    not a GGUF, or not of the layers that the manifest has.
    """
    with opened(path) as file:
        sizes = {name: tensor.n_bytes for name, tensor in file.tensors().items()}
        heads = file.heads(spec)
        inner = file.number(f"{spec.architecture}.feed_forward_length", 4 * spec.n_embd)
    state = heads.key_value * (heads.key_size + heads.value_size)
    layers = [0] * spec.n_layer
    for name, size in sizes.items():
        if match := re.match(r"blk\.(\d+)\.", name):
            if int(match[1]) >= spec.n_layer:
                raise BundleCorrupt(path, f"has {name!r}, the manifest {spec.n_layer} layers")
            layers[int(match[1])] += size
    output = sizes.get("output.weight", sizes.get("token_embd.weight", 0))
    # Three rows of the feed-forward's width, four of the model's, and the logits, in float32.
    work = 4 * (_BATCH_ROWS * (3 * inner + 4 * spec.n_embd) + _SCORED_ROWS * spec.outputs)
    return LayerBytes(tuple(layers), output, state * (4 if exact else 2), work)
