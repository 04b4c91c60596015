"""MobileVLM V2's connector: pooled, positions from one depthwise convolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, linear, to_grid, to_rows
from edgevlm.export.parts import Net
from edgevlm.parts.ldpv2 import LdpV2


def _build(b: Builder, _: LdpV2, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, 144, out]."""
    x = linear(b, "mlp.mlp.2", activation(b, "mlp.mlp.1", linear(b, "mlp.mlp.0", features), "gelu"))
    grid = to_grid(b, "grid", x)
    # A matrix on either side: the same for every h, where pooling operators want h = 12 k.
    pool = _pooling(grid.shape[1])
    x = b.matmul("pool", b.constant("pool.rows", pool), grid)
    x = b.matmul("pool", x, b.constant("pool.columns", pool.T))
    x = b.apply("Add", "peg", b.conv("peg.peg.0", x, pad=1, groups=x.shape[0]), x)
    return to_rows(b, "rows", x)


def _pooling(side: int) -> NDArray[np.float32]:
    """Adaptive average pooling of one axis as a matrix float32 [12, side]."""
    n = LdpV2.POOLED
    pool = np.zeros((n, side), np.float32)
    for i in range(n):
        start, end = i * side // n, -(-(i + 1) * side // n)
        pool[i, start:end] = 1 / (end - start)
    return pool


NET = Net(_build)
