"""Gemma 3's connector."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import averaged, rms_norm
from edgevlm.export.parts import Net
from edgevlm.export.parts.gemma import NORM_OFFSET
from edgevlm.parts.pooled import Pooled


def _build(b: Builder, config: Pooled, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
    x = averaged(b, "averaged", features, config.factor)
    x = rms_norm(b, "mm_soft_emb_norm", x, config.norm_eps, NORM_OFFSET)
    return b.matmul("projected", x, b.weight("mm_input_projection_weight"))


NET = Net(_build)
