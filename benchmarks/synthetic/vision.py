"""Random weights as ONNX graphs: a SigLIP tower in 8 bits and a linear projector.

The only module here that needs onnx. The linear maps are what onnxruntime's dynamic quantization
makes of them: activations quantized on the fly, weights per output channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import EngineMissing
from edgevlm.family import Config

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise EngineMissing("synthetic models need onnx", 'pip install "edgevlm[export]"') from None

OPSET = 18


class _Graph:
    """Collects nodes and weights; a name stands for a value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._rng = np.random.default_rng(0)

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; the name of its output, or a list of them."""
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

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
        return str(self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon))

    def quantized(self, x: str) -> list[str]:
        """8-bit values, their scale and zero point."""
        found: list[str] = self.node("DynamicQuantizeLinear", x, outputs=3)
        return found

    def linear(self, x: list[str], rows: int, columns: int) -> str:
        """A linear map of quantized values, in 8 bits, with a bias."""
        values, scale, zero = x
        weight = self._rng.integers(-127, 128, (rows, columns), np.int8)
        # Even values in -127..127 have a deviation of 73.
        step = self.constant(np.full(columns, 1 / (73 * rows**0.5)))
        product = self.node("MatMulInteger", values, self.constant(weight, np.int8), zero,
                            self.constant(np.zeros(columns), np.int8))  # fmt: skip
        exact = self.node("Cast", product, to=TensorProto.FLOAT)
        scaled = self.node("Mul", exact, self.node("Mul", scale, step))
        return str(self.node("Add", scaled, self.constant(np.zeros(columns))))

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


def write_encoder(path: Path, config: Config) -> None:
    """pixels float32 [n, 3, size, size] -> features float32 [n, patches, width]."""
    width, patch, size = config["hidden_size"], config["patch_size"], config["image_size"]
    patches = (size // patch) ** 2
    graph = _Graph()
    kernel = graph.random(width, 3, patch, patch)
    bias = graph.constant(np.zeros(width))
    x = graph.node("Conv", "pixels", kernel, bias, strides=[patch, patch])
    x = graph.node("Reshape", x, graph.constant([0, width, patches], np.int64))
    x = graph.node("Transpose", x, perm=[0, 2, 1])
    x = graph.node("Add", x, graph.random(1, patches, width))
    for _ in range(config["num_hidden_layers"]):
        x = graph.node("Add", x, _attention(graph, x, config, patches))
        x = graph.node("Add", x, _mlp(graph, x, config))
    graph.norm(x, width, config["layer_norm_eps"])
    graph.save(path, ("pixels", ["n", 3, size, size]), ("features", ["n", patches, width]))


def _attention(graph: _Graph, x: str, config: Config, patches: int) -> str:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    each = width // heads
    inside = graph.quantized(graph.norm(x, width, config["layer_norm_eps"]))
    split = graph.constant([0, patches, heads, each], np.int64)
    q, k, v = (graph.node("Reshape", graph.linear(inside, width, width), split) for _ in range(3))
    q = graph.node("Transpose", q, perm=[0, 2, 1, 3])
    k = graph.node("Transpose", k, perm=[0, 2, 3, 1])
    v = graph.node("Transpose", v, perm=[0, 2, 1, 3])
    scores = graph.node("Mul", graph.node("MatMul", q, k), graph.constant(each**-0.5))
    mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), v)
    mixed = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = graph.node("Reshape", mixed, graph.constant([0, patches, width], np.int64))
    return graph.linear(graph.quantized(mixed), width, width)


def _mlp(graph: _Graph, x: str, config: Config) -> str:
    width, inner = config["hidden_size"], config["intermediate_size"]
    inside = graph.quantized(graph.norm(x, width, config["layer_norm_eps"]))
    x = graph.linear(inside, width, inner)
    # GELU in its tanh form, as the tracer writes it.
    cube = graph.node("Pow", x, graph.constant(3.0))
    sum_ = graph.node("Add", x, graph.node("Mul", cube, graph.constant(0.044715)))
    bent = graph.node("Tanh", graph.node("Mul", sum_, graph.constant((2 / np.pi) ** 0.5)))
    half = graph.node("Mul", x, graph.constant(0.5))
    x = graph.node("Mul", half, graph.node("Add", bent, graph.constant(1.0)))
    return graph.linear(graph.quantized(x), inner, width)


def write_projector(path: Path, config: Config, patches: int) -> None:
    """features float32 [n, patches, in] -> embeddings float32 [n, patches, out]."""
    graph = _Graph()
    x = graph.node("MatMul", "features", graph.random(config["in"], config["out"]))
    graph.node("Add", x, graph.constant(np.zeros(config["out"])))
    inside, outside = (["n", patches, config[side]] for side in ("in", "out"))
    graph.save(path, ("features", inside), ("embeddings", outside))
