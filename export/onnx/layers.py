"""Layers of towers and connectors, in the forms that onnxruntime joins into fewer operators.

Those are the forms of PyTorch's exporter, but for the tanh of GELU: there it is the one of x ** 3,
which becomes FastGelu.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edgevlm.export.onnx.graph import Array, Builder, Value, same
from edgevlm.parts import VisionTower
from edgevlm.parts.text_tower import TextTower


def linear(b: Builder, name: str, x: Value, gain: float = 1.0) -> Value:
    """A linear map with `name`.weight and, if there is one, `name`.bias, both times `gain`."""
    out, width = b.shape(f"{name}.weight")
    matrix = b.weight(f"{name}.weight", lambda w: w.T if gain == 1 else w.T * gain, (width, out))
    y = b.matmul(name, x, matrix)
    if not b.has(f"{name}.bias"):
        return y
    return b.apply("Add", name, y, b.weight(f"{name}.bias", lambda v: v if gain == 1 else v * gain))


def layer_norm(b: Builder, name: str, x: Value, eps: float) -> Value:
    """A norm over the last axis."""
    scale, bias = b.weight(f"{name}.weight"), b.weight(f"{name}.bias")
    given = [x.name, scale.name, bias.name]
    return b.node("LayerNormalization", name, given, x.shape, axis=-1, epsilon=eps)


def rms_norm(b: Builder, name: str, x: Value, eps: float, offset: float = 0.0) -> Value:
    """A norm over the last axis by its root mean square, scaled by the weight plus `offset`."""
    scale = b.weight(f"{name}.weight", lambda w: w + offset)
    square = b.mean(name, b.apply("Pow", name, x, b.number(2.0)), len(x.shape) - 1)
    root = b.apply("Sqrt", name, b.apply("Add", name, square, b.number(eps)))
    return b.apply("Mul", name, b.apply("Div", name, x, root), scale)


def activation(b: Builder, name: str, x: Value, kind: str) -> Value:
    """One of edgevlm.parts.ACTIVATIONS."""
    return _ACTIVATIONS[kind](b, name, x)


def _erf_gelu(b: Builder, name: str, x: Value) -> Value:
    y = b.apply("Erf", name, b.apply("Div", name, x, b.number(math.sqrt(2))))
    y = b.apply("Mul", name, x, b.apply("Add", name, y, b.number(1.0)))
    return b.apply("Mul", name, y, b.number(0.5))


def _tanh_gelu(b: Builder, name: str, x: Value) -> Value:
    y = b.apply("Mul", name, b.apply("Pow", name, x, b.number(3.0)), b.number(0.044715))
    y = b.apply("Mul", name, b.apply("Add", name, x, y), b.number(math.sqrt(2 / math.pi)))
    y = b.apply("Add", name, b.apply("Tanh", name, y), b.number(1.0))
    return b.apply("Mul", name, b.apply("Mul", name, x, b.number(0.5)), y)


def _silu(b: Builder, name: str, x: Value) -> Value:
    return b.apply("Mul", name, x, b.apply("Sigmoid", name, x))


def _quick_gelu(b: Builder, name: str, x: Value) -> Value:
    gate = b.apply("Sigmoid", name, b.apply("Mul", name, x, b.number(1.702)))
    return b.apply("Mul", name, x, gate)


_ACTIVATIONS = {
    "gelu": _erf_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
}


# Scores of an attention that are in memory at once, where it has more than twice as many: a quarter
# of a gigabyte with what is made of them, and a tower of 4096 patches and 16 heads has 16 times so
# many.
SCORES = 1 << 24


def attention(
    b: Builder, name: str, q: Value, k: Value, v: Value, heads: int, mask: Value | None = None
) -> Value:
    """Queries [n, rows, width] read values [n, sources, width] by keys of the same shape; `mask`
    [n, 1, rows, sources] is added to their scores.
    """
    (rows, width), head = q.shape, q.shape[1] // heads
    q, k, v = (b.reshape(name, x, x.shape[0], heads, head) for x in (q, k, v))
    q, v = b.transpose(name, q, 1, 0, 2), b.transpose(name, v, 1, 0, 2)
    k = b.transpose(name, k, 1, 2, 0)

    def read(some: Value) -> Value:
        scores = b.apply("Mul", name, b.matmul(name, some, k), b.number(head**-0.5))
        if mask:
            scores = b.apply("Add", name, scores, mask)
        return b.matmul(name, b.apply("Softmax", name, scores, axis=-1), v)

    all_scores = heads * rows * k.shape[-1]
    step = rows if mask or all_scores <= 2 * SCORES else max(1, SCORES * rows // all_scores)
    starts = range(0, rows, step)
    some = [b.part(name, q, 1, i, min(step, rows - i)) if step < rows else q for i in starts]
    y = b.joined(name, [read(queries) for queries in some], 1)
    return b.reshape(name, b.transpose(name, y, 1, 0, 2), rows, width)


def encoder_layer(
    b: Builder, name: str, x: Value, config: VisionTower | TextTower, mask: Value | None = None
) -> Value:
    """A layer with the tensors of edgevlm.parts.encoder_layer; `mask` as in attention."""
    y = layer_norm(b, f"{name}.layer_norm1", x, config.layer_norm_eps)
    q, k, v = (linear(b, f"{name}.self_attn.{kind}_proj", y) for kind in "qkv")
    y = attention(b, f"{name}.self_attn", q, k, v, config.num_attention_heads, mask)
    x = b.apply("Add", name, x, linear(b, f"{name}.self_attn.out_proj", y))
    y = layer_norm(b, f"{name}.layer_norm2", x, config.layer_norm_eps)
    return b.apply("Add", name, x, mlp(b, f"{name}.mlp", y, config.hidden_act))


def unit(b: Builder, name: str, x: Value) -> Value:
    """[n, width] -> rows of length 1."""
    return b.apply("Div", name, x, b.length(name, x))


def mlp(b: Builder, name: str, x: Value, kind: str) -> Value:
    """Two linear maps, fc1 and fc2, and an activation between them."""
    y = activation(b, f"{name}.act", linear(b, f"{name}.fc1", x), kind)
    return linear(b, f"{name}.fc2", y)


def patches(b: Builder, name: str, pixels: Value, side: int) -> Value:
    """Pixels [n, channels, h, w] -> rows [n, patches, width], patch by patch of side * side."""
    grid = b.conv(name, pixels, stride=side)
    return to_rows(b, name, grid)


def with_first(
    b: Builder, x: Value, first: str, positions: str, fit: Callable[[Array], Array] = same
) -> Value:
    """Rows [n, patches, width] with the tensor `first` above them and `positions` added to all;
    `fit` makes of those as many as there are rows then.
    """
    rows, width = x.shape

    def table(row: Array, numbers: Array) -> Array:
        found = fit(numbers.reshape(-1, width)).copy()
        found[0] += row.reshape(width)
        return found

    # Zeros above and the first row in the sum: an Expand would have to ask for the batch.
    added = b.made(positions, (first, positions), table, (rows + 1, width))
    return b.apply("Add", positions, b.above(positions, x), added)


def to_rows(b: Builder, name: str, grid: Value) -> Value:
    """[n, d, h, w] -> [n, h * w, d]."""
    d, h, w = grid.shape
    return b.transpose(name, b.reshape(name, grid, d, h * w), 1, 0)


def to_grid(b: Builder, name: str, rows: Value) -> Value:
    """[n, h * h, d] -> [n, d, h, h], row by row."""
    n_rows, d = rows.shape
    side = math.isqrt(n_rows)
    return b.reshape(name, b.transpose(name, rows, 1, 0), d, side, side)


def averaged(b: Builder, name: str, rows: Value, factor: int) -> Value:
    """[n, h * h, d] -> [n, (h / factor) ** 2, d]: means of squares of neighbours, row by row."""
    n_rows, width = rows.shape
    cells = math.isqrt(n_rows) // factor
    grid = b.mean(name, b.reshape(name, rows, cells, factor, cells, factor, width), 1, 3)
    return b.reshape(name, grid, cells * cells, width)


def merged(b: Builder, name: str, rows: Value, factor: int) -> Value:
    """[n, h * h, d] -> [n, (h / factor) ** 2, factor ** 2 * d]: pixel shuffle, squares of
    neighbours behind one another, row by row.
    """
    n_rows, width = rows.shape
    cells = math.isqrt(n_rows) // factor
    grid = b.reshape(name, rows, cells, factor, cells, factor, width)
    grid = b.transpose(name, grid, 0, 2, 1, 3, 4)
    return b.reshape(name, grid, cells * cells, factor * factor * width)
