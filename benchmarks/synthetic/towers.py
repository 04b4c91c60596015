"""Vision towers of random weights in 8 bits, one function for each kind in export/towers.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.benchmarks.synthetic.graph import Graph
from edgevlm.parts.eva import EvaTower


def write_encoder(path: Path, config: Any) -> None:
    """pixels float32 [n, 3, size, size] -> features float32 [n, patches, width]."""
    graph, size = Graph(), config.image_size
    TOWERS[type(config).__name__.lower().removesuffix("tower")](graph, config)
    features = ["n", config.rows, config.hidden_size]
    graph.save(path, ("pixels", ["n", 3, size, size]), ("features", features))


def siglip(graph: Graph, config: Any) -> None:
    """SigLIP: every patch after the last norm."""
    width, rows = config.hidden_size, config.rows
    x = _embedded(graph, config, graph.constant(np.zeros(width)))
    x = graph.node("Add", x, graph.random(1, rows, width))
    x = _layers(graph, x, config, rows, graph.gelu_tanh)
    graph.norm(x, width, config.layer_norm_eps)


def clip(graph: Graph, config: Any) -> None:
    """CLIP up to the layer that is read: a class token in front, which most models do not read."""
    width, rows = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
    x = _with_class(graph, _embedded(graph, config), width)
    x = graph.node("Add", x, graph.random(1, rows, width))
    x = graph.norm(x, width, config.layer_norm_eps)
    bend = {"quick_gelu": graph.quick_gelu, "gelu": graph.gelu}[config.hidden_act]
    x = _layers(graph, x, config, rows, bend)
    start = graph.constant([0 if config.class_token else 1], np.int64)
    graph.node("Slice", x, start, graph.constant([rows], np.int64), graph.constant([1], np.int64))


def eva(graph: Graph, config: Any) -> None:
    """EVA: a class token in front, queries, keys and values from one map, a norm at the end."""
    width, rows = config.hidden_size, config.rows
    x = _with_class(graph, _embedded(graph, config, graph.constant(np.zeros(width))), width)
    x = graph.node("Add", x, graph.random(1, rows, width))
    x = _layers(graph, x, config, rows, graph.gelu)
    graph.norm(x, width, config.final_norm_eps)


TOWERS: dict[str, Callable[[Graph, Any], None]] = {"siglip": siglip, "clip": clip, "eva": eva}


def _embedded(graph: Graph, config: Any, *bias: str) -> str:
    """The patches as rows."""
    width, patch = config.hidden_size, config.patch_size
    kernel = graph.random(width, 3, patch, patch)
    x = graph.node("Conv", "pixels", kernel, *bias, strides=[patch, patch])
    return graph.transpose(graph.reshape(x, 0, width, -1), 0, 2, 1)


def _with_class(graph: Graph, x: str, width: int) -> str:
    """The class token in front of the patches of every picture."""
    shape = graph.constant([1, width], np.int64)
    shape = graph.node("Concat", graph.node("Shape", x, start=0, end=1), shape, axis=0)
    return graph.node("Concat", graph.node("Expand", graph.random(width), shape), x, axis=1)


def _layers(graph: Graph, x: str, config: Any, rows: int, bend: Callable[[str], str]) -> str:
    for _ in range(config.num_hidden_layers):
        x = graph.node("Add", x, _attention(graph, x, config, rows))
        x = graph.node("Add", x, _mlp(graph, x, config, bend))
    return x


def _attention(graph: Graph, x: str, config: Any, rows: int) -> str:
    width, heads = config.hidden_size, config.num_attention_heads
    each = width // heads
    inside = graph.quantized(graph.norm(x, width, config.layer_norm_eps))
    if isinstance(config, EvaTower):
        parts = graph.split(graph.linear8(inside, width, 3 * width), 3)
    else:
        parts = [graph.linear8(inside, width, width) for _ in range(3)]
    q, k, v = (graph.reshape(part, 0, rows, heads, each) for part in parts)
    q, k = graph.transpose(q, 0, 2, 1, 3), graph.transpose(k, 0, 2, 3, 1)
    v = graph.transpose(v, 0, 2, 1, 3)
    scores = graph.node("Mul", graph.node("MatMul", q, k), graph.constant(each**-0.5))
    mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), v)
    mixed = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), 0, rows, width)
    return graph.linear8(graph.quantized(mixed), width, width)


def _mlp(graph: Graph, x: str, config: Any, bend: Callable[[str], str]) -> str:
    width, inner = config.hidden_size, config.intermediate_size
    inside = graph.quantized(graph.norm(x, width, config.layer_norm_eps))
    bent = bend(graph.linear8(inside, width, inner))
    return graph.linear8(graph.quantized(bent), inner, width)
