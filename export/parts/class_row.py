"""CLIP's head: the class token's row, normed and mapped."""

from __future__ import annotations

from edgevlm.export.checkpoint.computed import transposed
from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import layer_norm, linear
from edgevlm.export.parts import Net
from edgevlm.parts.class_row import ClassRow


def _build(b: Builder, config: ClassRow, features: Value) -> Value:
    """Features with the class token's row first."""
    x = b.part("class", features, 0, 0, 1)
    x = layer_norm(b, "post_layernorm", x, config.layer_norm_eps)
    x = b.reshape("class", x, config.hidden_size)
    return linear(b, "projection", x)


NET = Net(_build, quantized=True)


def canonical(found: Weights, _: ClassRow) -> Weights:
    """open_clip's layout: other names, and the projection the other way round."""
    out = renamed(found, {r"ln_post\.(.+)": r"post_layernorm.\1"}, {})
    if matrix := out.pop("proj", None):
        out["projection.weight"] = transposed(matrix)
    return out
