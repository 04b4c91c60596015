"""Hooks into llama.cpp's graph: nodes seen, and rewritten, right after they are computed."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import llama_cpp as llama
import numpy as np
import numpy.typing as npt
from llama_cpp._ctypes_extensions import load_shared_library

from edgevlm.errors import EngineError

Float = npt.NDArray[np.float32]

_ggml = load_shared_library("ggml-base", Path(llama.__file__).parent / "lib")
_ggml.ggml_get_name.restype, _ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
_ggml.ggml_nelements.restype, _ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
for _name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
    _function = getattr(_ggml, _name)
    _function.restype = None
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

# Architectures whose feed-forward is gated by GELU.
GEGLU = ("gemma", "gemma2")
_GATE, _UP, _GEGLU = b"ffn_gate", b"ffn_up", b"ffn_geglu"


class ExactGelu:
    """Computes GELU in float32 where ggml looks it up in a table of half floats.

    The table moves the logits of an f32 decoder by up to 1e-2 (measured on tiny random Gemma 2, at
    a standard deviation of 5); without it 1.5e-3 are left. Each layer's gate and up projections are
    kept as they are computed, and the gated product is written anew. Costs a few copies a layer,
    so it serves f32 decoders only, whose purpose is exactness.

    Pass `callback` as `llama_context_params.cb_eval`; call `start` before every decode and `check`
    after it.
    """

    def __init__(self, n_layer: int) -> None:
        self.callback = llama.ggml_backend_sched_eval_callback(self._node)
        self._n_layer = n_layer
        self._kept: dict[bytes, Float] = {}
        self._edits = 0

    def _node(self, tensor: int, ask: bool, _: object) -> bool:
        kind, _, layer = _ggml.ggml_get_name(tensor).partition(b"-")
        if ask:
            return kind in (_GATE, _UP, _GEGLU)
        if kind == _GEGLU:
            product = _gelu(self._kept.pop(_GATE + layer)) * self._kept.pop(_UP + layer)
            _ggml.ggml_backend_tensor_set(tensor, product.ctypes.data, 0, product.nbytes)
            self._edits += 1
        else:
            data = np.empty(_ggml.ggml_nelements(tensor), np.float32)
            _ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            self._kept[kind + layer] = data
        return True

    def start(self) -> None:
        """Begins the count for the next decode."""
        self._edits = 0
        self._kept.clear()

    def check(self) -> None:
        """Raises EngineError unless every layer was rewritten once since `start`.

        An exception in the callback would only be printed, and a node that llama.cpp renames would
        be passed over without a word; the count catches both.
        """
        if self._edits != self._n_layer:
            raise EngineError(
                f"GELU was rewritten in {self._edits} of {self._n_layer} layers; this llama.cpp "
                "builds another graph than edgevlm knows; install the llama-cpp-python of setup.cfg"
            )


def _gelu(x: Float) -> Float:
    """The tanh form, float32 in and out."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    gelu: Float = 0.5 * x * (1 + np.tanh(inner))
    return gelu
