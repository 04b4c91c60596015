"""MobileVLM's connector, as torchvision 0.15 and timm build its blocks."""

from __future__ import annotations

from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, layer_norm, linear, to_grid, to_rows
from edgevlm.export.parts import Net
from edgevlm.parts.ldp import Ldp

_EPS = 1e-5


def _build(b: Builder, config: Ldp, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, ceil(h / 2)^2, out]."""
    x = linear(b, "mlp.3", activation(b, "mlp.2", linear(b, "mlp.1", features), "gelu"))
    grid = to_grid(b, "grid", x)
    grid = b.apply("Add", "mb_block.1", grid, _block(b, "mb_block.1.block", grid, stride=1))
    return to_rows(b, "rows", _block(b, "mb_block.2.block", grid, stride=2))


def _block(b: Builder, name: str, grid: Value, stride: int) -> Value:
    """MobileNetV3's inverted residual as torchvision 0.15 builds it for equal widths, with channel
    norms; without the residual.
    """
    x = b.conv(f"{name}.0.0", grid, stride=stride, pad=1, groups=grid.shape[0])
    x = b.apply("HardSwish", f"{name}.0.2", _channel_norm(b, f"{name}.0.1", x))
    x = b.apply("Mul", f"{name}.1", x, _gates(b, f"{name}.1", x))
    return _channel_norm(b, f"{name}.2.1", b.conv(f"{name}.2.0", x))


def _gates(b: Builder, name: str, grid: Value) -> Value:
    """Squeeze and excitation: a number for each channel, [n, d, 1, 1]."""
    x = b.conv(f"{name}.fc1", b.mean(name, grid, 1, 2))
    x = b.conv(f"{name}.fc2", b.apply("Relu", name, x))
    return b.apply("HardSigmoid", name, x, alpha=1 / 6)


def _channel_norm(b: Builder, name: str, grid: Value) -> Value:
    """Layer norm over the channels of every pixel (timm's LayerNormAct2d without activation)."""
    x = layer_norm(b, name, b.transpose(name, grid, 1, 2, 0), _EPS)
    return b.transpose(name, x, 2, 0, 1)


NET = Net(_build)
