"""The connector that is one linear map."""

from __future__ import annotations

from edgevlm.export.onnx import layers
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.parts import Net
from edgevlm.parts.linear import Linear


def _build(b: Builder, config: Linear, features: Value) -> Value:
    """Features [n, rows, in] -> embeddings [n, rows, out], scaled by their weights."""
    return layers.linear(b, "linear", features, config.scale)


NET = Net(_build)
