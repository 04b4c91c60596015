"""Operators over what a picture of any size leaves open: lengths that are known when a graph runs.

The rows of one picture are the first axis here, where other graphs have the batch, so that layers
work on them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgevlm.export.onnx.graph import MICROSOFT, Builder, Value

# A number, or one that the graph computes.
Length = int | Value


def length(b: Builder, name: str, x: Value, axis: int) -> Value:
    """The length of an axis, the first one 0."""
    return b.node("Shape", name, [x.name], (), start=axis, end=axis + 1)


def computed(b: Builder, operator: str, name: str, *given: Length) -> Value:
    """Arithmetic on lengths: Div, Mod, Add, ..."""
    return b.node(operator, name, [vector(b, name, g) for g in given], ())


def vector(b: Builder, name: str, *lengths: Length) -> str:
    """The name of a vector of lengths."""
    if numbers := [n for n in lengths if isinstance(n, int)]:
        if len(numbers) == len(lengths):
            return b.constant(f"int64 {numbers}", np.array(numbers, np.int64)).name
        names = [vector(b, name, n) for n in lengths]
    else:
        names = [n.name for n in lengths if isinstance(n, Value)]
    return names[0] if len(names) == 1 else b.node("Concat", name, names, (), axis=0).name


def shaped(
    b: Builder, name: str, x: Value, to: Sequence[Length], shape: tuple[int, ...] = ()
) -> Value:
    """A tensor with the axes `to`, one of which may be -1; `shape` are those behind the first."""
    return b.node("Reshape", name, [x.name, vector(b, name, *to)], shape)


def ordered(b: Builder, name: str, x: Value, *axes: int) -> Value:
    """All axes in another order, the first one too."""
    return b.node("Transpose", name, [x.name], (), perm=axes)


def first(b: Builder, name: str, x: Value, axes: Sequence[int], counts: Sequence[Length]) -> Value:
    """The first `counts` along some axes, of each as many."""
    ends = vector(b, name, *counts)
    starts, along = vector(b, name, *[0] * len(axes)), vector(b, name, *axes)
    return b.node("Slice", name, [x.name, starts, ends, along], ())


def longer(b: Builder, name: str, x: Value, more: Sequence[Length], value: float = 0.0) -> Value:
    """Axes with so many more behind, all of them the value."""
    pads = vector(b, name, *[0] * len(more), *more)
    return b.node("Pad", name, [x.name, pads, b.number(value).name], ())


def attention(b: Builder, name: str, q: Value, k: Value, v: Value, heads: int) -> Value:
    """Queries [n, width] read values of the same shape by keys of it: of one picture all rows.

    One operator, which keeps no scores: of 5120 rows they would be 1.7 GB.
    """
    axis = vector(b, name, 0)
    given = [b.node("Unsqueeze", name, [x.name, axis], ()).name for x in (q, k, v)]
    shape = (-1, *q.shape)
    attributes = {"domain": MICROSOFT, "num_heads": heads}
    read = b.node("MultiHeadAttention", name, given, shape, **attributes)
    return b.node("Squeeze", name, [read.name, axis], q.shape)
