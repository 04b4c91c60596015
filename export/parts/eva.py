"""EVA's tower, positions fitted to the picture's grid."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.checkpoint import tensors
from edgevlm.export.checkpoint.computed import stacked, zeros
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import attention, layer_norm, linear, mlp, patches, with_first
from edgevlm.export.parts import Net
from edgevlm.parts.eva import EvaTower

Float32 = NDArray[np.float32]


def _build(b: Builder, config: EvaTower, pixels: Value) -> Value:
    x = patches(b, "embeddings.patch_embedding", pixels, config.patch_size)
    fit = partial(_fitted, side=config.grid)
    x = with_first(b, x, "embeddings.class_embedding", "embeddings.position_embedding", fit)
    for i in range(config.num_hidden_layers):
        x = _layer(b, f"encoder.layers.{i}", x, config)
    return layer_norm(b, "post_layernorm", x, config.final_norm_eps)


def _layer(b: Builder, name: str, x: Value, config: EvaTower) -> Value:
    y = layer_norm(b, f"{name}.layer_norm1", x, config.layer_norm_eps)
    fused, width = linear(b, f"{name}.self_attn.qkv", y), config.hidden_size
    q, k, v = (b.part(f"{name}.self_attn", fused, 1, i * width, width) for i in range(3))
    y = attention(b, f"{name}.self_attn", q, k, v, config.num_attention_heads)
    x = b.apply("Add", name, x, linear(b, f"{name}.self_attn.projection", y))
    y = layer_norm(b, f"{name}.layer_norm2", x, config.layer_norm_eps)
    return b.apply("Add", name, x, mlp(b, f"{name}.mlp", y, config.hidden_act))


NET = Net(_build, quantized=True)


def _fitted(rows: Float32, side: int) -> Float32:
    """The class token's position row, and the others fitted to a grid, as the original does
    (eva_vit.py, interpolate_pos_embed): bicubic.
    """
    stored = round((len(rows) - 1) ** 0.5)
    if stored == side:
        return rows
    grid = rows[1:].reshape(stored, stored, -1)
    matrix = _bicubic(stored, side)
    return np.concatenate(
        (rows[:1], np.einsum("ij,kl,jld->ikd", matrix, matrix, grid).reshape(side * side, -1))
    )


def _bicubic(stored: int, side: int) -> Float32:
    """PyTorch's bicubic interpolation of one axis as a matrix float32 [side, stored]: corners not
    aligned, the last row repeated beyond the ends.
    """
    matrix = np.zeros((side, stored))
    for i in range(side):
        where = (i + 0.5) * stored / side - 0.5
        for tap in range(-1, 3):
            j = math.floor(where) + tap
            matrix[i, min(max(j, 0), stored - 1)] += _cubic(abs(where - j))
    return matrix.astype(np.float32)


def _cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel with PyTorch's slope at 1."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


def canonical(found: tensors.Weights, config: EvaTower) -> tensors.Weights:
    """eva_vit_g.pth's biases of queries and values, fused with zeros for the keys' between them."""
    out = dict(found)
    for i in range(config.num_hidden_layers):
        stem = f"encoder.layers.{i}.self_attn."
        q, v = found.get(f"{stem}q_bias"), found.get(f"{stem}v_bias")
        if q and v:
            fused = stacked((q, zeros(q, f"{stem}k_bias"), v), q.name)
            del out[f"{stem}q_bias"], out[f"{stem}v_bias"]
            out[f"{stem}qkv.bias"] = fused
    return out
