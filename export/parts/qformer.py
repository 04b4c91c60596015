"""BLIP-2's Q-Former as a connector: learned queries read the encoder's features.

The branch of it that reads text beside the queries (InstructBLIP) is not built. Facts from
salesforce/LAVIS (blip2_models/Qformer.py) and transformers (models/blip_2), whose names it has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, attention, layer_norm, linear
from edgevlm.export.parts import Net
from edgevlm.parts.qformer import QFormer

Floats = NDArray[np.floating]


def _build(b: Builder, config: QFormer, features: Value) -> Value:
    """Features [n, patches, in] -> embeddings [n, queries, out]: post-norm layers over the queries,
    which are the same for all pictures until they read the first features.
    """
    queries = b.weight("query_tokens")
    x = layer_norm(b, "layernorm", Value(queries.name, queries.shape[1:]), config.layer_norm_eps)
    for i in range(config.num_hidden_layers):
        name = f"encoder.layer.{i}"
        x = _attention(b, f"{name}.attention", x, x, config)
        if i % config.cross_attention_frequency == 0:
            x = _attention(b, f"{name}.crossattention", x, features, config)
        dense = linear(b, f"{name}.intermediate_query.dense", x)
        y = activation(b, f"{name}.intermediate_query", dense, "gelu")
        x = _output(b, f"{name}.output_query", y, x, config)
    return _maps(b, x, config)


def _attention(b: Builder, name: str, x: Value, source: Value, config: QFormer) -> Value:
    """Queries attend to `source`; the result is added to them and normed."""
    q = linear(b, f"{name}.attention.query", x)
    k, v = (linear(b, f"{name}.attention.{kind}", source) for kind in ("key", "value"))
    read = attention(b, f"{name}.attention", q, k, v, config.num_attention_heads)
    return _output(b, f"{name}.output", read, x, config)


def _output(b: Builder, name: str, x: Value, residual: Value, config: QFormer) -> Value:
    """A linear map, added to what it came from and normed."""
    x = b.apply("Add", name, linear(b, f"{name}.dense", x), residual)
    return layer_norm(b, f"{name}.LayerNorm", x, config.layer_norm_eps)


def _maps(b: Builder, x: Value, config: QFormer) -> Value:
    """The maps behind the layers, which have nothing between them, as one."""
    names = [f"maps.{i}.{kind}" for i in range(len(config.widths)) for kind in ("weight", "bias")]
    weight = b.made(
        "maps.weight", names, lambda *maps: _folded(maps)[0].T, (x.shape[1], config.widths[-1])
    )
    bias = b.made("maps.bias", names, lambda *maps: _folded(maps)[1], (config.widths[-1],))
    return b.apply("Add", "maps", b.matmul("maps", x, weight), bias)


def _folded(maps: tuple[Floats, ...]) -> tuple[Floats, Floats]:
    """Weight and bias, float32, of linear maps one behind the other, given as weight, bias, weight,
    ...; multiplied in float64.
    """
    weight, bias = (values.astype(np.float64) for values in maps[:2])
    for more, shift in zip(maps[2::2], maps[3::2], strict=True):
        matrix = more.astype(np.float64)
        weight, bias = matrix @ weight, matrix @ bias + shift
    return weight.astype(np.float32), bias.astype(np.float32)


NET = Net(_build, quantized=True)
