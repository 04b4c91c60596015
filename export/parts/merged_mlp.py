"""InternVL's connector."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, layer_norm, linear, merged
from edgevlm.export.parts import Net
from edgevlm.parts.merged_mlp import MergedMlp

_EPS = 1e-5  # torch's own, which the original does not change


def _build(b: Builder, config: MergedMlp, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
    x = layer_norm(b, "layer_norm", merged(b, "merged", features, config.factor), _EPS)
    return linear(b, "linear_2", activation(b, "act", linear(b, "linear_1", x), "gelu"))


NET = Net(_build)
