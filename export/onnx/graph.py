"""A builder of ONNX graphs: one input, nodes, one output, and a part's tensors by name.

The batch is the first axis and dynamic, every other axis is known, but for the number of a text's
tokens, the second axis of a text tower, and no graph computes a shape, but for parts that see
pictures of any size: those work on rows as on a batch (free.py).
Weights stay in their files until the graph is written, and then pass through memory one at a time.
Knows operators; layers.py makes layers of them, and the rooms of export/parts/ whole parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx import storage

# The first opset with LayerNormalization is 17; every onnxruntime that edgevlm accepts has all of
# 18. Its files are of version 8.
OPSET = 18
# onnxruntime's own operators, which know no versions.
MICROSOFT = "com.microsoft"
_OPSETS = {"": OPSET, MICROSOFT: 1}
_IR_VERSION = 8
# The batch's name; the runtime sets it to one for devices that plan for known shapes.
_BATCH = "n"
_TOKENS = "tokens"

Array = NDArray[Any]
Shape = tuple[int, ...]
# What a weight becomes of the tensors that it is made of.
Change = Callable[..., Array]


@dataclass(frozen=True)
class Value:
    """A float32 tensor [n, *shape] of a graph; n is 1 where it does not depend on the input. Of an
    input or an output, axes that are the picture's to say are -1.
    """

    name: str
    shape: Shape


@dataclass(frozen=True)
class Weight:
    """A float32 tensor [*shape] that stands in a graph."""

    name: str
    shape: Shape


Operand = Value | Weight


def same(values: Array) -> Array:
    """The values as they are."""
    return values


class Builder:
    """A graph that grows: each method adds an operator under a name and returns its output.

    `tensors` are the part's by canonical name; `read` is called with 1 for each that is read. With
    `ids` the input are token ids, int64 [n, tokens], and `shape` is the largest number of tokens.
    """

    def __init__(
        self,
        given: str,
        shape: Shape,
        tensors: Weights,
        read: Callable[[int], None],
        *,
        ids: bool = False,
    ) -> None:
        self.input = Value(given, shape)
        self._ids = ids
        self._tensors = tensors
        self._read = read
        self._unused = set(tensors)
        self._nodes: list[Any] = []
        self._told: list[Any] = []
        self._names: Counter[str] = Counter()
        self._weights: dict[str, Callable[[], Array]] = {}

    def write(self, output: Value, name: str, path: Path) -> None:
        """Writes the graph up to `output`, which is called `name` from then on; raises SourceError
        for weights that cannot be read.
        """
        assert not self._unused, f"not in the graph: {sorted(self._unused)}"
        (last,) = (node for node in self._nodes if node.output[0] == output.name)
        last.output[0] = name
        given, made = self._given(), _described(Value(name, output.shape), name)
        model = helper.make_model(
            helper.make_graph(self._nodes, path.stem, [given], [made], value_info=self._told),
            producer_name="edgevlm",
            ir_version=_IR_VERSION,
            opset_imports=[
                helper.make_opsetid(domain, version)
                for domain, version in _OPSETS.items()
                if domain in {"", *(node.domain for node in self._nodes)}
            ],
        )
        storage.write(model, path, self._values())

    def _given(self) -> Any:
        if not self._ids:
            return _described(self.input, self.input.name)
        return helper.make_tensor_value_info(self.input.name, TensorProto.INT64, [_BATCH, _TOKENS])

    def _values(self) -> Iterator[tuple[str, Array]]:
        for name, values in self._weights.items():
            yield name, values()

    def has(self, name: str) -> bool:
        """True if the part has a tensor of this name."""
        return name in self._tensors

    def shape(self, name: str) -> Shape:
        """The shape of a tensor of the part."""
        return self._tensors[name].shape

    def weight(self, name: str, change: Change = same, shape: Shape | None = None) -> Weight:
        """A tensor of the part; `change` makes it one of `shape` where that is not its own."""
        return self.made(name, (name,), change, shape or self.shape(name))

    def made(self, name: str, of: Sequence[str], change: Change, shape: Shape) -> Weight:
        """A weight that `change` makes of the values, float32, of tensors of the part."""
        self._unused -= set(of)

        def values() -> Array:
            found = change(*(self._float32(tensor) for tensor in of))
            assert found.shape == shape, f"{name}: {found.shape} is not {shape}"
            return found

        self._weights[name] = values
        return Weight(name, shape)

    def _float32(self, name: str) -> Array:
        self._read(1)
        return self._tensors[name].float32()

    def constant(self, name: str, values: Array) -> Weight:
        """A weight that is not of the part."""
        self._weights[name] = lambda: values
        return Weight(name, values.shape)

    def number(self, value: float) -> Weight:
        """A number; the same one stands in the graph once."""
        return self.constant(f"float32 {value!r}", np.array(value, np.float32))

    def _integers(self, *values: int) -> str:
        return self.constant(f"int64 {[*values]}", np.array(values, np.int64)).name

    def node(self, operator: str, name: str, given: Sequence[str], shape: Shape,
             **attributes: Any) -> Value:  # fmt: skip
        """Any operator with one output of that shape; `given` are its inputs' names."""
        stem = f"{name}/{operator}"
        self._names[stem] += 1
        if (times := self._names[stem]) > 1:
            stem = f"{stem}_{times}"
        self._nodes.append(helper.make_node(operator, [*given], [stem], stem, **attributes))
        made = Value(stem, shape)
        if attributes.get("domain"):
            # What onnx knows no types of it would not know behind this node either.
            self._told.append(_described(made, stem))
        return made

    def apply(self, operator: str, name: str, *given: Operand, **attributes: Any) -> Value:
        """An operator on each element: Add, Mul, Erf, Softmax, ...; operands are broadcast."""
        shape = np.broadcast_shapes(*(operand.shape for operand in given))
        return self.node(operator, name, [o.name for o in given], shape, **attributes)

    def matmul(self, name: str, a: Operand, b: Operand) -> Value:
        """a @ b, broadcast over all axes but the last two."""
        assert a.shape[-1] == b.shape[-2], (name, a, b)
        outer = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.node("MatMul", name, [a.name, b.name], (*outer, *a.shape[-2:-1], b.shape[-1]))

    def reshape(self, name: str, x: Value, *shape: int) -> Value:
        """[n, *x.shape] -> [n, *shape]."""
        assert prod(shape) == prod(x.shape), (name, x, shape)
        # A zero keeps what is there: the batch, and a text's tokens.
        kept = 1 if self._ids and x.shape[0] == shape[0] == self.input.shape[0] else 0
        sizes = self._integers(0, *(0,) * kept, *shape[kept:])
        return self.node("Reshape", name, [x.name, sizes], shape)

    def transpose(self, name: str, x: Value, *axes: int) -> Value:
        """The axes behind the batch in another order; 0 is the first of them."""
        order = [0, *(axis + 1 for axis in axes)]
        return self.node("Transpose", name, [x.name], tuple(x.shape[a] for a in axes), perm=order)

    def part(self, name: str, x: Value, axis: int, start: int, count: int) -> Value:
        """`count` of what lies along an axis behind the batch, 0 the first of them."""
        shape = tuple(count if i == axis else size for i, size in enumerate(x.shape))
        ends = [self._integers(i) for i in (start, start + count, axis + 1)]
        return self.node("Slice", name, [x.name, *ends], shape)

    def rows(self, name: str, table: Weight, indices: Value) -> Value:
        """Rows [n, *indices, width] of a table [count, width] by their indices [n, *indices]."""
        return self.node(
            "Gather", name, [table.name, indices.name], (*indices.shape, *table.shape[1:])
        )

    def picked(self, name: str, x: Value, index: Value) -> Value:
        """The row [n, width] of x [n, rows, width] at an index int64 [n, 1]."""
        return self.node("GatherND", name, [x.name, index.name], x.shape[1:], batch_dims=1)

    def cast(self, name: str, x: Value, kind: Literal["float32", "int32"]) -> Value:
        """The values in another type."""
        to = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}[kind]
        return self.node("Cast", name, [x.name], x.shape, to=to)

    def length(self, name: str, x: Value) -> Value:
        """[n, width] -> the length of every row, [n, 1]."""
        given = [x.name, self._integers(-1)]
        return self.node("ReduceL2", name, given, (1,), keepdims=1)

    def wider(self, name: str, x: Value, axis: int) -> Value:
        """The values with another axis of 1 behind the batch, the first of them 0."""
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        return self.node("Unsqueeze", name, [x.name, self._integers(axis + 1)], shape)

    def mean(self, name: str, x: Value, *axes: int) -> Value:
        """The mean along axes behind the batch, 0 the first of them, which become 1 long."""
        shape = tuple(1 if i in axes else size for i, size in enumerate(x.shape))
        given = [x.name, self._integers(*(axis + 1 for axis in axes))]
        return self.node("ReduceMean", name, given, shape, keepdims=1)

    def joined(self, name: str, values: Sequence[Value], axis: int) -> Value:
        """Values one behind the other along an axis behind the batch, 0 the first of them."""
        if len(values) == 1:
            return values[0]
        first = values[0].shape
        total = sum(value.shape[axis] for value in values)
        shape = (*first[:axis], total, *first[axis + 1 :])
        return self.node("Concat", name, [v.name for v in values], shape, axis=axis + 1)

    def above(self, name: str, x: Value) -> Value:
        """[n, rows, width] with a row of zeros above them."""
        rows, width = x.shape
        return self.node("Pad", name, [x.name, self._integers(0, 1, 0, 0, 0, 0)], (rows + 1, width))

    def conv(self, name: str, x: Value, stride: int = 1, pad: int = 0, groups: int = 1) -> Value:
        """A convolution over [n, channels, h, w] with the part's `name`.weight and, if there is
        one, `name`.bias.
        """
        stems = [n for n in (f"{name}.weight", f"{name}.bias") if self.has(n)]
        out, _, *kernel = self.shape(stems[0])
        sides = (
            (side + 2 * pad - k) // stride + 1 for side, k in zip(x.shape[1:], kernel, strict=True)
        )
        return self.node(
            "Conv",
            name,
            [x.name, *(self.weight(n).name for n in stems)],
            (out, *sides),
            kernel_shape=kernel,
            strides=[stride, stride],
            pads=[pad] * 4,
            group=groups,
        )

    def grown(self, name: str, x: Value) -> Value:
        """A transposed convolution of 4 x 4 over [n, channels, h, w] with the part's `name`.weight
        and `name`.bias: [n, out, 2 * h, 2 * w].
        """
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        (_, out, *kernel), (_, h, w) = weight.shape, x.shape
        assert kernel == [4, 4], (name, kernel)
        given = [x.name, weight.name, bias.name]
        shape = (out, 2 * h, 2 * w)
        strides, pads = [2, 2], [1] * 4
        return self.node(
            "ConvTranspose", name, given, shape, kernel_shape=kernel, strides=strides, pads=pads
        )


def _described(value: Value, where: str) -> Any:
    sides = (side if side >= 0 else f"{where}.{i}" for i, side in enumerate(value.shape))
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [_BATCH, *sides])
