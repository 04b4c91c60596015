"""Projectors of random weights, one function for each kind in export/connectors.py.

As in exported bundles, a Q-Former is in 8 bits and all others are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.benchmarks.synthetic.graph import Graph
from edgevlm.family import Model
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.qformer import QFormer

_EPSILON = 1e-5
_POOLED = 12


def write_projector(path: Path, model: Model) -> None:
    """features float32 [n, patches, in] -> embeddings float32 [n, tokens, n_embd]."""
    config, rows = model.projector, model.vision.rows
    graph = Graph()
    CONNECTORS[type(config).__name__.lower().removesuffix("tower")](graph, config, rows)
    inside, outside = (
        ["n", rows, config.in_features],
        ["n", model.image.tokens, model.decoder.n_embd],
    )
    graph.save(path, ("features", inside), ("embeddings", outside))


def precision(config: Any) -> str:
    """What a manifest says of such a projector."""
    return "int8" if isinstance(config, QFormer) else "fp32"


def linear(graph: Graph, config: Any, rows: int) -> None:
    """One linear map."""
    graph.linear("features", config.in_features, config.out_features)


def mlp(graph: Graph, config: Any, rows: int) -> None:
    """Linear maps with GELU between them."""
    _mlp(graph, config, config.depth)


def ldp(graph: Graph, config: Any, rows: int) -> None:
    """MobileVLM's: two linear maps, two inverted residual blocks, a quarter of the patches."""
    d = config.out_features
    grid = _grid(graph, _mlp(graph, config, 2), d, math.isqrt(rows))
    grid = graph.node("Add", grid, _inverted_residual(graph, grid, d, stride=1))
    _rows(graph, _inverted_residual(graph, grid, d, stride=2), d)


def ldpv2(graph: Graph, config: Any, rows: int) -> None:
    """MobileVLM V2's: two linear maps, pooling, one depthwise convolution."""
    d, side = config.out_features, math.isqrt(rows)
    grid = _grid(graph, _mlp(graph, config, 2), d, side)
    pool = np.full((_POOLED, side), 1 / side, np.float32)
    grid = graph.node("MatMul", graph.constant(pool), grid)
    grid = graph.node("MatMul", grid, graph.constant(pool.T))
    place = graph.node("Conv", grid, graph.random(d, 1, 3, 3), graph.constant(np.zeros(d)),
                       group=d, pads=[1, 1, 1, 1])  # fmt: skip
    _rows(graph, graph.node("Add", place, grid), d)


def qformer(graph: Graph, config: Any, rows: int) -> None:
    """BLIP-2's: learned queries attend to one another and, in some layers, to the features."""
    d, queries, eps = config.hidden_size, config.queries, config.layer_norm_eps
    seen, mlp_width = graph.quantized("features"), config.intermediate_size
    x = graph.norm(graph.random(1, queries, d), d, eps)
    for i in range(config.num_hidden_layers):
        own = graph.quantized(x)
        x = _attended(graph, config, x, own, (own, queries, d))
        if i % config.cross_attention_frequency == 0:
            x = _attended(graph, config, x, graph.quantized(x), (seen, rows, config.in_features))
        wide = graph.gelu(graph.linear8(graph.quantized(x), d, mlp_width))
        narrow = graph.linear8(graph.quantized(wide), mlp_width, d)
        x = graph.norm(graph.node("Add", narrow, x), d, eps)
    graph.linear8(graph.quantized(x), d, config.widths[-1])


CONNECTORS: dict[str, Callable[[Graph, Any, int], None]] = {
    "linear": linear,
    "mlp": mlp,
    "ldp": ldp,
    "ldpv2": ldpv2,
    "qformer": qformer,
}


def _mlp(graph: Graph, config: Any, depth: int) -> str:
    x = graph.linear("features", config.in_features, config.out_features)
    for _ in range(1, depth):
        x = graph.linear(graph.gelu(x), config.out_features, config.out_features)
    return x


def _attended(
    graph: Graph, config: Any, x: str, own: list[str], source: tuple[list[str], int, int]
) -> str:
    """Queries x, in 8 bits `own`, that read `source` (its 8-bit values, rows and width), added to
    themselves and normed.
    """
    d, heads, queries = config.hidden_size, config.num_attention_heads, config.queries
    (seen, rows, width), each = source, d // heads
    q = graph.reshape(graph.linear8(own, d, d), -1, queries, heads, each)
    k, v = (graph.reshape(graph.linear8(seen, width, d), -1, rows, heads, each) for _ in range(2))
    scores = graph.node("MatMul", graph.transpose(q, 0, 2, 1, 3), graph.transpose(k, 0, 2, 3, 1))
    scores = graph.node("Div", scores, graph.constant(each**0.5))
    read = graph.node("Softmax", scores, axis=-1)
    read = graph.node("MatMul", read, graph.transpose(v, 0, 2, 1, 3))
    read = graph.reshape(graph.transpose(read, 0, 2, 1, 3), -1, queries, d)
    read = graph.linear8(graph.quantized(read), d, d)
    return graph.norm(graph.node("Add", read, x), d, config.layer_norm_eps)


def _grid(graph: Graph, rows: str, d: int, side: int) -> str:
    return graph.reshape(graph.transpose(rows, 0, 2, 1), -1, d, side, side)


def _rows(graph: Graph, grid: str, d: int) -> str:
    return graph.transpose(graph.reshape(grid, 0, d, -1), 0, 2, 1)


def _inverted_residual(graph: Graph, x: str, d: int, stride: int) -> str:
    wide = graph.node("Conv", x, graph.random(d, 1, 3, 3), group=d, pads=[1, 1, 1, 1],
                      strides=[stride, stride])  # fmt: skip
    wide = graph.node("HardSwish", _channel_norm(graph, wide, d))
    gated = graph.node("Mul", wide, _gates(graph, wide, d))
    narrow = graph.node("Conv", gated, graph.random(d, d, 1, 1))
    return _channel_norm(graph, narrow, d)


def _gates(graph: Graph, x: str, d: int) -> str:
    """Squeeze and excitation."""
    inner = Ldp(in_features=d, out_features=d).squeezed
    mean = graph.node("ReduceMean", x, graph.constant([2, 3], np.int64), keepdims=1)
    few = graph.node("Conv", mean, graph.random(inner, d, 1, 1), graph.constant(np.zeros(inner)))
    all_ = graph.node("Conv", graph.node("Relu", few), graph.random(d, inner, 1, 1),
                      graph.constant(np.zeros(d)))  # fmt: skip
    return graph.node("HardSigmoid", all_, alpha=1 / 6, beta=0.5)


def _channel_norm(graph: Graph, x: str, d: int) -> str:
    last = graph.norm(graph.transpose(x, 0, 2, 3, 1), d, _EPSILON)
    return graph.transpose(last, 0, 3, 1, 2)
