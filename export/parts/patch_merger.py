"""Qwen2-VL's and Qwen2.5-VL's connector."""

from __future__ import annotations

from edgevlm.export.onnx import free
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, layer_norm, linear, rms_norm
from edgevlm.export.parts import Net
from edgevlm.parts.patch_merger import PatchMerger

_EPS = 1e-6


def _build(b: Builder, config: PatchMerger, features: Value) -> Value:
    """Features [1, rows, in] in squares of neighbours -> embeddings [1, squares, out]."""
    width = config.in_features * config.factor**2
    x = free.shaped(b, "features", features, [-1, config.in_features], (config.in_features,))
    x = (rms_norm if config.gated else layer_norm)(b, "ln_q", x, _EPS)
    x = free.shaped(b, "merged", x, [-1, width], (width,))
    x = linear(b, "mlp.2", activation(b, "mlp.1", linear(b, "mlp.0", x), "gelu"))
    one = free.vector(b, "embeddings", 0)
    return b.node("Unsqueeze", "embeddings", [x.name, one], (-1, config.out_features))


NET = Net(_build)
