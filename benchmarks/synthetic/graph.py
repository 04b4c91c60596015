"""ONNX graphs of random weights, node by node. The only module here that needs onnx.

The linear maps of towers are what onnxruntime's dynamic quantization makes of them: activations
quantized on the fly, weights per output channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import EngineMissing

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise EngineMissing("synthetic models need onnx", 'pip install "edgevlm[export]"') from None

OPSET = 18


class Graph:
    """Collects nodes and weights; a name stands for a value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._rng = np.random.default_rng(0)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node; the name of its output."""
        return str(self._nodes(kind, inputs, 1, attributes)[0])

    def _nodes(
        self, kind: str, inputs: tuple[str, ...], outputs: int, attributes: dict[str, Any]
    ) -> list[str]:
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Adds a weight with these values."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def random(self, *shape: int, std: float = 0.02) -> str:
        """Adds a float32 weight."""
        return self.constant(self._rng.standard_normal(shape, np.float32) * np.float32(std))

    def norm(self, x: str, width: int, epsilon: float) -> str:
        """Layer norm over the last axis."""
        scale, bias = self.constant(np.ones(width)), self.constant(np.zeros(width))
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def reshape(self, x: str, *shape: int) -> str:
        """A new shape, in which 0 keeps an axis."""
        return self.node("Reshape", x, self.constant(shape, np.int64))

    def transpose(self, x: str, *axes: int) -> str:
        """The axes in another order."""
        return self.node("Transpose", x, perm=axes)

    def split(self, x: str, parts: int) -> list[str]:
        """The last axis in equal parts."""
        return self._nodes("Split", (x,), parts, {"axis": -1, "num_outputs": parts})

    def linear(self, x: str, rows: int, columns: int) -> str:
        """A linear map with a bias, float32."""
        product = self.node("MatMul", x, self.random(rows, columns, std=rows**-0.5))
        return self.node("Add", product, self.constant(np.zeros(columns)))

    def quantized(self, x: str) -> list[str]:
        """8-bit values, their scale and zero point."""
        return self._nodes("DynamicQuantizeLinear", (x,), 3, {})

    def linear8(self, x: list[str], rows: int, columns: int) -> str:
        """A linear map of quantized values, in 8 bits, with a bias."""
        values, scale, zero = x
        weight = self._rng.integers(-127, 128, (rows, columns), np.int8)
        # Even values in -127..127 have a deviation of 73.
        step = self.constant(np.full(columns, 1 / (73 * rows**0.5)))
        product = self.node("MatMulInteger", values, self.constant(weight, np.int8), zero,
                            self.constant(np.zeros(columns), np.int8))  # fmt: skip
        exact = self.node("Cast", product, to=TensorProto.FLOAT)
        scaled = self.node("Mul", exact, self.node("Mul", scale, step))
        return self.node("Add", scaled, self.constant(np.zeros(columns)))

    def gelu(self, x: str) -> str:
        """GELU, exact, as the tracer writes it."""
        erf = self.node("Erf", self.node("Div", x, self.constant(2**0.5)))
        return self._halved(x, erf)

    def gelu_tanh(self, x: str) -> str:
        """GELU in its tanh form, as the tracer writes it."""
        cube = self.node("Pow", x, self.constant(3.0))
        sum_ = self.node("Add", x, self.node("Mul", cube, self.constant(0.044715)))
        inner = self.node("Mul", sum_, self.constant((2 / np.pi) ** 0.5))
        return self._halved(x, self.node("Tanh", inner))

    def quick_gelu(self, x: str) -> str:
        """CLIP's x * sigmoid(1.702 x)."""
        gate = self.node("Sigmoid", self.node("Mul", x, self.constant(1.702)))
        return self.node("Mul", x, gate)

    def _halved(self, x: str, gate: str) -> str:
        half = self.node("Mul", x, self.constant(0.5))
        return self.node("Mul", half, self.node("Add", gate, self.constant(1.0)))

    def save(
        self, path: Path, source: tuple[str, list[Any]], target: tuple[str, list[Any]]
    ) -> None:
        """Writes the graph between one input and one output, large weights beside it."""
        name, shape = target
        self.nodes[-1].output[0] = name
        graph = helper.make_graph(
            self.nodes,
            "synthetic",
            [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
            self.weights,
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        data = path.with_name(f"{path.name}.data")
        onnx.save_model(
            model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024
        )
        # onnx makes the data readable for the owner alone.
        data.chmod(path.stat().st_mode)
