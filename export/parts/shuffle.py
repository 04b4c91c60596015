"""Idefics3's and SmolVLM's connector."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import linear, merged
from edgevlm.export.parts import Net
from edgevlm.parts.shuffle import Shuffle


def _build(b: Builder, config: Shuffle, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
    return linear(b, "proj", merged(b, "merged", features, config.factor))


NET = Net(_build)
