"""Hooks into llama.cpp's graph: nodes seen, and rewritten, right after they are computed.

llama.cpp asks its evaluation callback of every node whether it is of interest, computes up to one
that is, and calls again before anything reads it. What is done to the values stands in edits.py;
here is what it takes to reach them, and the metadata that llama.cpp's own API does not hand out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import llama_cpp as llama
import numpy as np
from llama_cpp._ctypes_extensions import load_shared_library

from edgevlm.errors import BundleCorrupt, EngineError
from edgevlm.runtimes.edits import ATTENTION, Edit, ExactGelu, ExtraNorms, Float, Visit
from edgevlm.specs import DecoderSpec

_ggml = load_shared_library("ggml-base", Path(llama.__file__).parent / "lib")


class _TensorHead(ctypes.Structure):
    """How a ggml_tensor begins."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p))


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_POINTER, _ID, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES = {
    "ggml_get_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_op_desc": (ctypes.c_char_p, [_POINTER]),
    "ggml_nelements": (ctypes.c_int64, [_POINTER]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "gguf_init_from_file": (_POINTER, [ctypes.c_char_p, _InitParams]),
    "gguf_free": (None, [_POINTER]),
    "gguf_find_key": (_ID, [_POINTER, ctypes.c_char_p]),
    "gguf_get_kv_type": (ctypes.c_int, [_POINTER, _ID]),
    "gguf_get_arr_type": (ctypes.c_int, [_POINTER, _ID]),
    "gguf_get_arr_n": (_SIZE, [_POINTER, _ID]),
    "gguf_get_arr_data": (_POINTER, [_POINTER, _ID]),
    "gguf_get_val_f32": (ctypes.c_float, [_POINTER, _ID]),
}
for _name, (_result, _arguments) in _SIGNATURES.items():
    _function = getattr(_ggml, _name)
    _function.restype, _function.argtypes = _result, _arguments

_GGUF_FLOAT32, _GGUF_ARRAY = 6, 9


class GraphHook:
    """Makes edits in every graph that llama.cpp computes.

    Pass `callback` as `llama_context_params.cb_eval`; call `start` before every decode and `check`
    after it. A decode is one graph: edgevlm's batches are never longer than llama.cpp's n_ubatch.
    """

    def __init__(self, edits: Iterable[Edit], n_layer: int) -> None:
        self.callback = llama.ggml_backend_sched_eval_callback(self._node)
        visits = {
            name.encode(): visit
            for edit in edits
            for layer in range(n_layer)
            for name, visit in edit.nodes(layer).items()
        }
        self._visits = visits
        # The attention's output, with its bias, is the next ADD after this node.
        self._attention = {
            b"kqv_out-%d" % i: visit
            for i in range(n_layer)
            if (visit := visits.get(f"{ATTENTION}-{i}".encode()))
        }
        self._next: Visit | None = None
        self._visit: Visit | None = None
        self._visited = 0
        self._error: BaseException | None = None

    def _node(self, tensor: int, ask: bool, _: object) -> bool:
        if ask:
            return self._wants(tensor)
        try:
            self._apply(tensor)
        # ctypes would only print it, and llama.cpp go on; `check` raises it.
        except BaseException as e:
            self._error = e
        return self._error is None

    def _wants(self, tensor: int) -> bool:
        """Whether a node is to be visited, once it is computed."""
        name = _ggml.ggml_get_name(tensor)
        if self._next and _ggml.ggml_op_desc(tensor) == b"ADD":
            # ggml names it by its number; an ADD with a name is one further on, of another kind.
            self._visit = self._next if name.startswith(b"node_") else None
            self._next = None
        else:
            self._next = self._attention.get(name, self._next)
            self._visit = self._visits.get(name)
        return self._visit is not None

    def _apply(self, tensor: int) -> None:
        assert self._visit
        n = _ggml.ggml_nelements(tensor)
        if _ggml.ggml_backend_buffer_is_host(_TensorHead.from_address(tensor).buffer):
            memory = (ctypes.c_float * n).from_address(_ggml.ggml_get_data(tensor))
            self._visit(np.frombuffer(memory, np.float32))
        else:
            values = np.empty(n, np.float32)
            _ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self._visit(values)
            _ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        self._visited += 1

    def start(self) -> None:
        """Begins the count for the next decode."""
        self._visited, self._next, self._error = 0, None, None

    def check(self) -> None:
        """Raises EngineError unless every node was visited once since `start`, without an error.

        A node that llama.cpp renames would be passed over without a word; the count catches it.
        """
        if self._error:
            raise EngineError(
                f"the change of llama.cpp's graph failed ({self._error!r}); "
                "report it with this line"
            ) from self._error
        if self._visited != len(self._visits):
            raise EngineError(
                f"{self._visited} of {len(self._visits)} nodes were changed; this llama.cpp builds "
                "another graph than edgevlm knows; install the llama-cpp-python of setup.cfg"
            )


def graph_hook(path: Path, spec: DecoderSpec, *, exact: bool) -> GraphHook | None:
    """What a decoder needs so that its graph is the original's; None where llama.cpp's own is.

    `exact` asks for float32 throughout. Raises BundleCorrupt where the GGUF at `path` lacks norms
    that the manifest states, or holds some that it does not.
    """
    edits: list[Edit] = []
    if exact and spec.architecture in ExactGelu.ARCHITECTURES:
        edits.append(ExactGelu(spec.architecture))
    if spec.extra_norms or spec.architecture == "phi2":
        edits += _extra_norms(path, spec)
    return GraphHook(edits, spec.n_layer) if edits else None


_NORMS = tuple(
    f"tinygptv.{name}"
    for name in (
        "attn_q_norm.weight",
        "attn_k_norm.weight",
        "attn_q_norm.bias",
        "attn_k_norm.bias",
        "post_attention_norm.weight",
    )
)


def _extra_norms(path: Path, spec: DecoderSpec) -> Sequence[ExtraNorms]:
    eps = [f"{spec.architecture}.attention.layer_norm_{kind}epsilon" for kind in ("", "rms_")]
    found = read_floats(path, (*_NORMS, *eps))
    if not spec.extra_norms:
        if any(name in found for name in _NORMS):
            raise BundleCorrupt(path, "holds norms that the manifest does not state")
        return []
    if missing := [name for name in (*_NORMS, *eps) if name not in found]:
        raise BundleCorrupt(
            path, f"lacks the norms {missing[0]!r} without which it answers nonsense"
        )
    heads = [found[name] for name in _NORMS[:4]]
    branch = found[_NORMS[4]]
    size, rest = divmod(len(heads[0]), spec.n_layer)
    same = len({len(array) for array in heads}) == 1
    if rest or not same or not size or spec.n_embd % size:
        raise BundleCorrupt(path, "holds norms of other heads than the manifest states")
    if len(branch) != spec.n_layer * spec.n_embd:
        raise BundleCorrupt(path, f"holds {_NORMS[4]!r} of another width than the manifest states")
    q_weight, k_weight, q_bias, k_bias = (a.reshape(spec.n_layer, 1, size) for a in heads)
    return [
        ExtraNorms(
            np.stack([q_weight, k_weight], 1),
            np.stack([q_bias, k_bias], 1),
            branch.reshape(spec.n_layer, spec.n_embd),
            float(found[eps[0]][0]),
            float(found[eps[1]][0]),
        )
    ]


def read_floats(path: Path, keys: Iterable[str]) -> dict[str, Float]:
    """Float arrays and numbers in a GGUF's metadata, float32 [n] each; absent keys are left out.

    ggml parses the file: gguf-py's reader makes Python objects of every token, which takes seconds.
    Raises BundleCorrupt for a file that is no GGUF and for a value of another type.
    """
    context = _ggml.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not context:
        raise BundleCorrupt(path, "is no GGUF file")
    try:
        ids = {key: _ggml.gguf_find_key(context, key.encode()) for key in keys}
        return {key: _floats(context, i, path, key) for key, i in ids.items() if i >= 0}
    finally:
        _ggml.gguf_free(context)


def _floats(context: int, i: int, path: Path, key: str) -> Float:
    kind = _ggml.gguf_get_kv_type(context, i)
    if kind == _GGUF_FLOAT32:
        return np.array([_ggml.gguf_get_val_f32(context, i)], np.float32)
    if kind != _GGUF_ARRAY or _ggml.gguf_get_arr_type(context, i) != _GGUF_FLOAT32:
        raise BundleCorrupt(path, f"{key!r} is not of float32 numbers")
    n = _ggml.gguf_get_arr_n(context, i)
    memory = (ctypes.c_float * n).from_address(_ggml.gguf_get_arr_data(context, i))
    return np.frombuffer(memory, np.float32).copy()
