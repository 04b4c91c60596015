"""Range and power of every tensor of a float32 graph while it sees pictures.

Static quantization takes its ranges from here, and every precision learns here which linear maps it
would hurt. Only three numbers of each tensor leave the graph, however large the picture.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgevlm.export.onnx import storage

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Flow:
    """Statistics of one tensor, float64 [pictures]: smallest and largest value, mean square."""

    low: Float64
    high: Float64
    power: Float64

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return float(max(self.high.max(), -self.low.min()))

    def noise(self, *, shared: bool) -> float:
        """Noise over signal, in the worst picture, of rounding to 256 even steps around zero.

        The range is each picture's own, or with `shared` that of all pictures.
        """
        low, high = np.minimum(self.low, 0), np.maximum(self.high, 0)
        if shared:
            low, high = low.min(), high.max()
        step = (high - low) / 255
        return float((step**2 / 12 / np.maximum(self.power, 1e-30)).max())


def measure(path: Path, tensors: Collection[str], pixels: NDArray[np.float32]) -> dict[str, Flow]:
    """The flow of float32 tensors of a graph over pixels float32 [pictures, 3, size, size].

    Writes a graph of the same weights beside `path` and removes it.
    """
    names = sorted(set(tensors))
    model = storage.skeleton(path)
    for i, name in enumerate(names):
        low, high, square, power = (f"flow.{i}.{what}" for what in ("low", "high", "sq", "power"))
        model.graph.node.extend(
            [
                helper.make_node("ReduceMin", [name], [low], keepdims=0),
                helper.make_node("ReduceMax", [name], [high], keepdims=0),
                helper.make_node("Mul", [name, name], [square]),
                helper.make_node("ReduceMean", [square], [power], keepdims=0),
            ]
        )
        outputs = (
            helper.make_tensor_value_info(o, TensorProto.FLOAT, []) for o in (low, high, power)
        )
        model.graph.output.extend(outputs)
    watched = path.with_name("flow." + path.name)
    try:
        storage.save_skeleton(model, watched)
        found = storage.run_each(watched, storage.input_name(path), pixels)
    finally:
        watched.unlink(missing_ok=True)
    return {
        name: Flow(*(found[f"flow.{i}.{what}"] for what in ("low", "high", "power")))
        for i, name in enumerate(names)
    }
