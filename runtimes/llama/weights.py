"""Models that llama.cpp loads from GGUF files."""

from __future__ import annotations

import ctypes
from pathlib import Path

from edgevlm.errors import BundleCorrupt, EngineError, OutOfMemory
from edgevlm.runtimes import checks
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.backends import Offload
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.tokenizer import LlamaTokenizer
from edgevlm.runtimes.native import Handle
from edgevlm.specs import DecoderSpec

_MROPE = (llama.LLAMA_ROPE_TYPE_MROPE, llama.LLAMA_ROPE_TYPE_IMROPE)


def load(
    path: Path, spec: DecoderSpec, offload: Offload, *, repack: bool
) -> tuple[Handle, tuple[int, int]]:
    """The model in a file, and how many layers of how many are on the device.

    Raises BundleCorrupt for a file that does not hold the decoder of `spec`, OutOfMemory without
    memory for it, EngineError where the device cannot take its layers.
    """
    ggml.quiet()
    # The vocabulary of a trimmed decoder spells no texts.
    checks.decoder(path, tokenizer=spec.outputs == spec.n_vocab)
    params = llama.llama_model_default_params()
    params.n_gpu_layers = offload.layers
    # An empty list is the CPU alone; without one llama.cpp takes every device it finds.
    handles = [offload.device.handle] if offload.device else []
    devices = (ctypes.c_void_p * (len(handles) + 1))(*handles)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.use_extra_bufts = repack

    def read() -> Handle | None:
        pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        return Handle("the decoder", pointer, llama.llama_model_free) if pointer else None

    # Not in the main thread: a Ctrl-C would be raised in the Python that llama.cpp calls with
    # its messages, and ctypes would drop it.
    loaded = interruptible(read, lambda: None)
    if not loaded and offload.device:
        raise EngineError(f"{offload.device.name} cannot load the decoder ({ggml.last_log()})")
    if not loaded and ggml.was_refused_memory():
        raise OutOfMemory(str(path))
    if not loaded:
        raise BundleCorrupt(path, f"llama.cpp cannot load it ({ggml.last_log()})")
    model, vocabulary = loaded.pointer, LlamaTokenizer(loaded).n_tokens
    found = (llama.llama_model_n_embd(model), llama.llama_model_n_layer(model), vocabulary)
    if found != (spec.n_embd, spec.n_layer, spec.outputs):
        raise BundleCorrupt(path, f"is another decoder (width, layers, vocabulary {found})")
    # llama.cpp reads four positions a row of such a decoder, whatever it is given.
    if (llama.llama_model_rope_type(model) in _MROPE) != (spec.positions == "mrope"):
        raise BundleCorrupt(path, f"its positions are not {spec.positions!r}")
    return loaded, ggml.offloaded()
