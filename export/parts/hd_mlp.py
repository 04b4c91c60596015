"""Phi-3-Vision's connector; its tiles are joined behind the graph, so the rows between them go
through its maps when it is exported.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.checkpoint.computed import reshaped
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, linear, merged
from edgevlm.export.parts import Net
from edgevlm.parts.hd_mlp import HdMlp

_BETWEEN = ("newline", "separator")


def _build(b: Builder, config: HdMlp, features: Value) -> Value:
    """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
    x = linear(b, "linear_1", merged(b, "merged", features, config.factor))
    return linear(b, "linear_2", activation(b, "act", x, "gelu"))


def _rows(config: HdMlp, tensors: Weights) -> NDArray[np.float32]:
    """The newline and the separator as the decoder reads them, [2, out]."""
    x = np.stack([tensors[name].float32() for name in _BETWEEN]).astype(np.float64)
    x = _linear(x, "linear_1", tensors)
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return _linear(x, "linear_2", tensors).astype(np.float32)


def _linear(x: NDArray[np.float64], name: str, tensors: Weights) -> NDArray[np.float64]:
    y: NDArray[np.float64] = x @ tensors[f"{name}.weight"].float32().T
    return y + tensors[f"{name}.bias"].float32()


def canonical(found: Weights, config: HdMlp) -> Weights:
    """The rows between tiles, which checkpoints have with axes of length 1."""
    flat = (config.merged,)
    return {
        name: reshaped(tensor, flat) if name in _BETWEEN and tensor.elements == flat[0] else tensor
        for name, tensor in found.items()
    }


NET = Net(_build, newline=_BETWEEN, rows=_rows)
