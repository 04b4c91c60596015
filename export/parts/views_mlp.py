"""Moondream2's connector."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, linear
from edgevlm.export.parts import Net
from edgevlm.parts.views_mlp import ViewsMlp


def _build(b: Builder, _: ViewsMlp, features: Value) -> Value:
    """Features [n, rows, in] -> embeddings [n, rows, out]."""
    return linear(b, "fc2", activation(b, "fc1", linear(b, "fc1", features), "gelu_pytorch_tanh"))


NET = Net(_build)
