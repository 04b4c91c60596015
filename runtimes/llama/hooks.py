"""Hooks into llama.cpp's graph: nodes seen, and rewritten, right after they are computed.

llama.cpp asks its evaluation callback of every node whether it is of interest, computes up to one
that is, and calls again before anything reads it. What is done to the values stands in edits.py;
here is what it takes to reach them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt, EngineError
from edgevlm.gguf_file import Library, opened
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.edits import ATTENTION, Edit, ExactGelu, ExtraNorms, Float, Visit
from edgevlm.specs import DecoderSpec


class _TensorHead(ctypes.Structure):
    """The first fields of a ggml_tensor."""

    _fields_ = (("type", c_int), ("buffer", c_void_p))


class _Tensor(ctypes.Structure):
    """A ggml_tensor up to its sources."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("eps", ctypes.c_float),  # of a norm: op_params[0]
        ("op_params", ctypes.c_int32 * 15),
        ("flags", ctypes.c_int32),
        ("src", c_void_p * 10),
    )


_transfer = (None, c_void_p, c_void_p, c_size_t, c_size_t)
_ggml = Library(
    "ggml-base",
    ggml_get_name=(c_char_p, c_void_p),
    ggml_op_desc=(c_char_p, c_void_p),
    ggml_nelements=(c_int64, c_void_p),
    ggml_get_data=(c_void_p, c_void_p),
    ggml_backend_buffer_is_host=(c_bool, c_void_p),
    ggml_backend_tensor_get=_transfer,
    ggml_backend_tensor_set=_transfer,
)

_REMEMBERED = 256
# Architectures whose norms add nothing in llama.cpp, whatever their files state: llama-cpp-python
# 0.3.36 reads the sections of qwen2vl's rotary positions and no epsilon. That moves logits by up to
# 1.7e-3 of their deviation where weights are small, as in an untrained Qwen2-VL, far less than a
# quantization does; to be asked of every node costs 1 to 2 ms a token. So it is mended in f32.
_WITHOUT_EPS = ("qwen2vl",)


def _array(address: int, n: int) -> Float:
    memory: Any = (ctypes.c_float * n).from_address(address)  # a buffer, which its stub leaves out
    array: Float = np.frombuffer(memory, np.float32)
    return array


Float64 = npt.NDArray[np.float64]


class GraphHook:
    """Makes edits in every graph that llama.cpp computes.

    Pass `callback` as `llama_context_params.cb_eval`; call `start` before every decode and `check`
    after it. A decode is one graph: edgevlm's batches are never longer than llama.cpp's n_ubatch.
    `eps` is what the graph's RMS norms add, where llama.cpp does not know it.
    """

    def __init__(self, edits: Iterable[Edit], n_layer: int, eps: float | None = None) -> None:
        self.callback = llama.ggml_backend_sched_eval_callback(self._node)
        visits = {
            name.encode(): visit
            for edit in edits
            for layer in range(n_layer)
            for name, visit in edit.nodes(layer).items()
        }
        self._visits = visits
        self._eps, self._norms, self._fewest = eps, 0, 2 * n_layer if eps else 0
        # The attention's output, with its bias, is the next ADD after this node.
        self._attention = {
            b"kqv_out-%d" % i: visit
            for i in range(n_layer)
            if (visit := visits.get(f"{ATTENTION}-{i}".encode()))
        }
        self._next: Visit | None = None
        self._visit: Visit | None = None
        # Arrays over the host's memory by (address, elements): a token's nodes lie where the last
        # one's did, and looking takes 30 µs less than asking. Nothing but the node there is read.
        self._memory: dict[tuple[int, int], Float] = {}
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
        """True for a node that is to be visited, once it is computed."""
        if self._eps and _ggml.ggml_op_desc(tensor) == b"RMS_NORM":
            # Before it is computed, and on every device alike.
            _Tensor.from_address(tensor).eps = self._eps
            self._norms += 1
        if not self._visits:
            return False
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
        place = (_ggml.ggml_get_data(tensor), _ggml.ggml_nelements(tensor))
        values = self._memory.get(place)
        if values is None and _ggml.ggml_backend_buffer_is_host(
            _TensorHead.from_address(tensor).buffer
        ):
            values = self._memory[place] = _array(*place)
        if values is not None:
            self._visit(values)
        else:
            values = np.empty(place[1], np.float32)
            _ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self._visit(values)
            _ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        self._visited += 1

    def start(self) -> None:
        """Begins the count for the next decode."""
        self._visited, self._norms, self._next, self._error = 0, 0, None, None
        if len(self._memory) > _REMEMBERED:
            self._memory.clear()

    def check(self) -> None:
        """Raises EngineError unless every node was visited once since `start`, without an error.

        A node that llama.cpp renames would be passed over without a word; the count catches it.
        """
        if self._error:
            raise EngineError(
                f"the change of llama.cpp's graph failed ({self._error!r}); "
                "report it with this line"
            ) from self._error
        if self._visited != len(self._visits) or self._norms < self._fewest:
            raise EngineError(
                f"{self._visited} of {len(self._visits)} nodes and {self._norms} norms were "
                "changed; this llama.cpp builds another graph than edgevlm knows; install the "
                "llama-cpp-python of setup.cfg"
            )


class Importance(GraphHook):
    """Sums the squares of every value that a layer's matrices are multiplied by, column by column:
    how much each column of their weights matters, as llama.cpp's own importance matrix has it.

    `inner` is the hook that the decoder has already; its edits come first.
    """

    def __init__(self, inner: GraphHook | None) -> None:
        super().__init__((), 0)
        self._inner = inner
        self._forward = False
        self._sums: dict[str, tuple[Float64, int]] = {}

    @property
    def mean_squares(self) -> dict[str, Float]:
        """Name of a matrix -> mean square of each column of its input, float32 [columns]."""
        return {name: (sums / n).astype(np.float32) for name, (sums, n) in self._sums.items()}

    def _wants(self, tensor: int) -> bool:
        self._forward = self._inner is not None and self._inner._wants(tensor)
        return self._forward or _multiplied(tensor) is not None

    def _apply(self, tensor: int) -> None:
        if self._forward:
            assert self._inner
            self._inner._apply(tensor)
        if name := _multiplied(tensor):
            given = _Tensor.from_address(_Tensor.from_address(tensor).src[1])
            columns, rows = given.ne[0], int(np.prod(given.ne[1:4]))
            if given.type != 0 or tuple(given.nb[:2]) != (4, 4 * columns):
                raise EngineError(f"the input of {name} is not rows of float32")
            values = np.empty((rows, columns), np.float32)
            address = _Tensor.from_address(tensor).src[1]
            _ggml.ggml_backend_tensor_get(address, values.ctypes.data, 0, values.nbytes)
            sums, n = self._sums.get(name, (np.zeros(columns), 0))
            self._sums[name] = (sums + np.square(values, dtype=np.float64).sum(0), n + rows)

    def start(self) -> None:
        """See GraphHook."""
        super().start()
        if self._inner:
            self._inner.start()

    def check(self) -> None:
        """See GraphHook."""
        super().check()
        if self._inner:
            self._inner.check()


def _multiplied(tensor: int) -> str | None:
    """The name of the layer's matrix that a node multiplies by, if it is such a node."""
    if _ggml.ggml_op_desc(tensor) != b"MUL_MAT":
        return None
    name = str(_ggml.ggml_get_name(_Tensor.from_address(tensor).src[0]).decode())
    return name if name.startswith("blk.") and name.endswith(".weight") else None


def graph_hook(
    path: Path, spec: DecoderSpec, *, exact: bool, more: Sequence[Edit] = ()
) -> GraphHook | None:
    """The hook that makes a decoder's graph the original's, and `more`; None where there is nothing
    to do.

    `exact` asks for float32 throughout. Raises BundleCorrupt where the GGUF at `path` lacks norms
    that the manifest states, or holds some that it does not.
    """
    edits: list[Edit] = [*more]
    if exact and spec.architecture in ExactGelu.ARCHITECTURES:
        edits.append(ExactGelu(spec.architecture))
    if spec.extra_norms or spec.architecture == "phi2":
        edits += _extra_norms(path, spec)
    eps = _eps(path, spec) if exact and spec.architecture in _WITHOUT_EPS else None
    return GraphHook(edits, spec.n_layer, eps) if edits or eps else None


def _eps(path: Path, spec: DecoderSpec) -> float | None:
    with opened(path) as file:
        found = file.floats(f"{spec.architecture}.attention.layer_norm_rms_epsilon")
    return None if found is None else float(found[0])


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
    with opened(path) as file:
        stated = {name: file.floats(name) for name in (*_NORMS, *eps)}
    found = {name: values for name, values in stated.items() if values is not None}
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
