"""The connector of several linear maps."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, linear
from edgevlm.export.parts import Net
from edgevlm.parts.mlp import Mlp


def build(b: Builder, config: Mlp, features: Value) -> Value:
    """Features [n, rows, in] -> embeddings [n, rows, out]; the maps have even numbers as names."""
    x = linear(b, "0", features)
    for i in range(1, config.depth):
        x = linear(b, str(2 * i), activation(b, str(2 * i - 1), x, "gelu"))
    return x


NET = Net(build)
