"""Edits of llama.cpp's graph, as arithmetic on arrays. Knows no engine.

A node is known by llama.cpp's name for it, "ffn_up-3" in layer 3. The attention's output, projected
and with its bias, has no name there; here it is ATTENTION with the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Visit = Callable[[Float], None]

ATTENTION = "attn_out"
# Values normalized at once: as many as stay in a core's second-level cache.
_BLOCK = 1 << 16


class Edit(Protocol):
    """One kind of change, made in every layer of every batch."""

    def nodes(self, layer: int) -> Mapping[str, Visit]:
        """Names of the layer's nodes -> what is done to their values, float32 [elements], in
        place. Every one is visited once a batch, in the order of the graph.
        """
        ...


class ExactGelu:
    """GELU in float32 where ggml looks it up in a table of half floats.

    The table moves the logits of an f32 decoder by up to 1e-2 (measured on tiny random Gemma 2, at
    a standard deviation of 5); without it 1.5e-3 are left. It costs a few copies a layer, so it
    serves f32 decoders only, whose purpose is exactness.
    """

    _GATED = ("gemma", "gemma2", "gemma3")
    ARCHITECTURES = (*_GATED, "phi2")

    def __init__(self, architecture: str) -> None:
        self._gated = architecture in self._GATED
        self._kept: dict[str, Float] = {}

    def nodes(self, layer: int) -> Mapping[str, Visit]:
        """See Edit."""
        if self._gated:
            return {
                f"ffn_gate-{layer}": partial(self._keep, "gate"),
                f"ffn_up-{layer}": partial(self._keep, "up"),
                f"ffn_geglu-{layer}": self._rewrite_product,
            }
        return {
            f"ffn_up_b-{layer}": partial(self._keep, "up"),
            f"ffn_gelu-{layer}": self._rewrite,
        }

    def _keep(self, name: str, values: Float) -> None:
        # A copy: ggml may compute the next node into the same memory.
        self._kept[name] = values.copy()

    def _rewrite_product(self, values: Float) -> None:
        np.multiply(_gelu(self._kept.pop("gate")), self._kept.pop("up"), out=values)

    def _rewrite(self, values: Float) -> None:
        values[:] = _gelu(self._kept.pop("up"))


def _gelu(x: Float) -> Float:
    """The tanh form, float32 in and out."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    gelu: Float = 0.5 * x * (1 + np.tanh(inner))
    return gelu


class Hidden:
    """Not a change: the output of the last of `n_layer` layers, before the last norm, is kept."""

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self._last, self._n_embd = n_layer - 1, n_embd
        self.row: Float | None = None

    def nodes(self, layer: int) -> Mapping[str, Visit]:
        """See Edit."""
        return {f"l_out-{layer}": self._keep} if layer == self._last else {}

    def _keep(self, values: Float) -> None:
        self.row = values[-self._n_embd :].copy()


@dataclass(frozen=True)
class ExtraNorms:
    """TinyGPT-V's norms, which no graph of llama.cpp has: a LayerNorm of every head's queries and
    keys before their rotary positions, an RMSNorm of the attention's projected output.

    All float32: `heads_weight` and `heads_bias` [n_layer, 2, 1, head_dim] (queries, keys),
    `branch_weight` [n_layer, n_embd].
    """

    heads_weight: Float
    heads_bias: Float
    branch_weight: Float
    heads_eps: float
    branch_eps: float

    def nodes(self, layer: int) -> Mapping[str, Visit]:
        """See Edit."""
        return {
            f"wqkv_b-{layer}": partial(self._heads, layer),
            f"{ATTENTION}-{layer}": partial(self._branch, layer),
        }

    # Between two edits llama.cpp reads its weights through every cache, so that an edit of one
    # token takes several times as long as its arithmetic: few and plain numpy calls cost least.

    def _heads(self, layer: int, values: Float) -> None:
        """Values [n, (queries, keys, values), heads, head_dim]."""
        width, size = self.branch_weight.shape[1], self.heads_weight.shape[3]
        weight, bias = self.heads_weight[layer], self.heads_bias[layer]
        mean = np.full((size, 1), 1 / size, np.float32)
        rows = values.reshape(-1, 3, width // size, size)
        step = max(1, _BLOCK // (2 * width))
        for start in range(0, len(rows), step):
            x = rows[start : start + step, :2]
            x -= x @ mean
            spread = np.square(x) @ mean
            spread += self.heads_eps
            x /= np.sqrt(spread)
            x *= weight
            x += bias

    def _branch(self, layer: int, values: Float) -> None:
        """Values [n, n_embd]."""
        weight = self.branch_weight[layer]
        for x in values.reshape(-1, len(weight)):
            x *= 1 / math.sqrt(float(x.dot(x)) / len(x) + self.branch_eps)
            x *= weight
