"""Qwen2-VL's and Qwen2.5-VL's tower, for pictures of any size.

Rows are in squares of merged patches, line by line, as the connector and the decoder want them.
Qwen2.5-VL's code goes window by window instead, and puts the rows in order again at last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.onnx import free
from edgevlm.export.onnx.free import Length, vector
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, attention, layer_norm, linear, mlp, rms_norm
from edgevlm.export.parts import Net
from edgevlm.parts.qwen2_vit import Qwen2Vit

_THETA = 10000.0
# Added to the scores of what is no part of a picture; half precision holds it.
_HIDDEN = -10000.0

# The largest int64: a slice that ends behind everything.
_TO_THE_END = (1 << 63) - 1


@dataclass(frozen=True)
class _Windows:
    """Squares of a picture, line by line, as windows of some and back; the last of a line and the
    last line of windows may be partly empty, which `mask` [windows, 1, 1, rows] hides.
    """

    config: Qwen2Vit
    lines: Value
    columns: Value
    more: tuple[Value, Value]
    down: Value
    across: Value
    mask: Value

    def split(self, b: Builder, name: str, x: Value) -> Value:
        """[rows, width] -> [windows, rows of one, width]."""
        (width,), side, each = x.shape, self.config.window, self.config.merge**2
        cells = free.shaped(b, name, x, [self.lines, self.columns, each * width])
        cells = free.longer(b, name, cells, [*self.more, 0])
        apart: list[Length] = [self.down, side, self.across, side, each * width]
        found = free.ordered(b, name, free.shaped(b, name, cells, apart), 0, 2, 1, 3, 4)
        rows = side * side * each
        return free.shaped(b, name, found, [-1, rows, width], (rows, width))

    def joined(self, b: Builder, name: str, x: Value) -> Value:
        """The same back."""
        width, side, each = x.shape[-1], self.config.window, self.config.merge**2
        apart = free.shaped(b, name, x, [self.down, self.across, side, side, each * width])
        apart = free.ordered(b, name, apart, 0, 2, 1, 3, 4)
        sides = [free.computed(b, "Mul", name, n, side) for n in (self.down, self.across)]
        cells = free.shaped(b, name, apart, [*sides, each * width])
        cells = free.first(b, name, cells, (0, 1), (self.lines, self.columns))
        return free.shaped(b, name, cells, [-1, width], (width,))


def _windows(b: Builder, config: Qwen2Vit, lines: Value, columns: Value) -> _Windows:
    name, side, each = "windows", config.window, config.merge**2
    # What is missing to whole windows: a remainder has the sign of its divisor.
    more = [
        free.computed(b, "Mod", name, free.computed(b, "Sub", name, 0, n), side)
        for n in (lines, columns)
    ]
    down, across = (
        free.computed(b, "Div", name, free.computed(b, "Add", name, n, m), side)
        for n, m in zip((lines, columns), more, strict=True)
    )
    sizes = free.vector(b, name, lines, columns, each)
    seen = b.node("ConstantOfShape", name, [sizes], ())
    seen = free.longer(b, name, seen, [*more, 0], _HIDDEN)
    seen = free.shaped(b, name, seen, [down, side, across, side, each])
    seen = free.ordered(b, name, seen, 0, 2, 1, 3, 4)
    rows = side * side * each
    mask = free.shaped(b, name, seen, [-1, 1, 1, rows], (1, 1, rows))
    return _Windows(config, lines, columns, (more[0], more[1]), down, across, mask)


def _build(b: Builder, config: Qwen2Vit, pixels: Value) -> Value:
    d, merge = config.hidden_size, config.merge
    grid = _patches(b, config, pixels)
    down, across = (free.length(b, "patch_embed", grid, axis) for axis in (2, 3))
    lines, columns = (free.computed(b, "Div", "squares", n, merge) for n in (down, across))
    patches = free.ordered(b, "patch_embed", grid, 0, 2, 3, 1)
    x = _in_squares(b, "patch_embed", patches, (lines, columns), merge, d)
    turns = [_turns(b, config, (down, across), (lines, columns), kind) for kind in ("cos", "sin")]
    windows = _windows(b, config, lines, columns) if config.window else None
    for i in range(config.num_hidden_layers):
        seen = None if i in config.full_layers else windows
        x = _layer(b, f"blocks.{i}", x, config, (turns[0], turns[1]), seen)
    return b.node("Unsqueeze", "features", [x.name, free.vector(b, "features", 0)], (-1, d))


def _patches(b: Builder, config: Qwen2Vit, pixels: Value) -> Value:
    """Pixels of a picture, or of two frames -> a map [1, width, lines, columns] of patches.

    The kernel over two frames, one for each, is its sum over their mean and its difference over
    half of theirs. The mean of a picture and itself is that picture to the last bit, and the
    difference nothing.
    """
    name, channels, side = "patch_embed", config.num_channels, [config.patch_size] * 2
    first, last = (
        b.node(
            "Slice", name, [pixels.name, *(vector(b, name, n) for n in span)], (channels, -1, -1)
        )
        for span in ((0, channels, 1), (-channels, _TO_THE_END, 1))
    )
    half, parts = b.number(0.5), list[str]()
    for operator, change, kernel in (("Add", _sum, "sum"), ("Sub", _difference, "difference")):
        both = b.node(operator, name, [first.name, last.name], first.shape)
        seen = b.node("Mul", name, [both.name, half.name], first.shape)
        weight = b.made(
            f"{name}.{kernel}",
            (f"{name}.proj.weight",),
            change,
            (config.hidden_size, channels, *side),
        )
        shape, given = (config.hidden_size, -1, -1), [seen.name, weight.name]
        parts.append(b.node("Conv", name, given, shape, kernel_shape=side, strides=side).name)
    return b.node("Add", name, parts, (config.hidden_size, -1, -1))


def _sum(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    total: NDArray[np.float32] = kernel.sum(2)
    return total


def _difference(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = kernel[:, :, 0] - kernel[:, :, 1]
    return found


def _in_squares(
    b: Builder, name: str, x: Value, squares: tuple[Value, Value], merge: int, width: int
) -> Value:
    """A map [1, lines, columns, width] as rows [n, width] in squares of merged patches."""
    apart: list[Length] = [squares[0], merge, squares[1], merge, width]
    found = free.ordered(b, name, free.shaped(b, name, x, apart), 0, 2, 1, 3, 4)
    return free.shaped(b, name, found, [-1, width], (width,))


def _turns(
    b: Builder,
    config: Qwen2Vit,
    sides: tuple[Value, Value],
    squares: tuple[Value, Value],
    kind: str,
) -> Value:
    """Cosines or sines [n, 1, head / 2] by which patches are turned: the first half of them by
    their line, the others by their column.
    """
    head = config.hidden_size // config.num_attention_heads
    n = head // 4
    table = b.constant(f"turns.{kind}", _table(config.reach, head, kind))
    name, parts = f"turns.{kind}", []
    whole = free.vector(b, name, *sides, n)
    for axis, side in enumerate(sides):
        found = free.first(b, name, Value(table.name, table.shape[1:]), (0,), (side,))
        place: list[Length] = [-1, 1, n] if axis == 0 else [1, -1, n]
        found = free.shaped(b, name, found, place)
        parts.append(b.node("Expand", name, [found.name, whole], ()).name)
    both = b.node("Concat", name, parts, (), axis=-1)
    rows = _in_squares(b, name, both, squares, config.merge, 2 * n)
    return b.reshape(name, rows, 1, 2 * n)


def _table(reach: int, head: int, kind: str) -> NDArray[np.float32]:
    """float32 [reach, head / 4]; the angles are float32 in the original."""
    powers = np.arange(0, head // 2, 2, dtype=np.float32) / np.float32(head // 2)
    frequencies = np.float32(1) / np.float32(_THETA) ** powers
    angles = np.outer(np.arange(reach, dtype=np.float32), frequencies).astype(np.float64)
    return (np.cos if kind == "cos" else np.sin)(angles).astype(np.float32)


def _layer(
    b: Builder,
    name: str,
    x: Value,
    config: Qwen2Vit,
    turns: tuple[Value, Value],
    windows: _Windows | None,
) -> Value:
    norm = rms_norm if config.gated else layer_norm
    d, heads = config.hidden_size, config.num_attention_heads
    qkv = linear(b, f"{name}.attn.qkv", norm(b, f"{name}.norm1", x, config.layer_norm_eps))
    q, k, v = (b.part(f"{name}.attn", qkv, 0, i * d, d) for i in range(3))
    q, k = (_turned(b, f"{name}.attn", part, heads, *turns) for part in (q, k))
    if windows:
        q, k, v = (windows.split(b, f"{name}.attn", part) for part in (q, k, v))
        y = attention(b, f"{name}.attn", q, k, v, heads, windows.mask)
        y = windows.joined(b, f"{name}.attn", y)
    else:
        y = free.attention(b, f"{name}.attn", q, k, v, heads)
    x = b.apply("Add", name, x, linear(b, f"{name}.attn.proj", y))
    y = norm(b, f"{name}.norm2", x, config.layer_norm_eps)
    if not config.gated:
        return b.apply("Add", name, x, mlp(b, f"{name}.mlp", y, config.hidden_act))
    gate = activation(b, f"{name}.mlp", linear(b, f"{name}.mlp.gate_proj", y), config.hidden_act)
    y = b.apply("Mul", f"{name}.mlp", gate, linear(b, f"{name}.mlp.up_proj", y))
    return b.apply("Add", name, x, linear(b, f"{name}.mlp.down_proj", y))


def _turned(b: Builder, name: str, x: Value, heads: int, cos: Value, sin: Value) -> Value:
    """Queries or keys [n, width], each head turned: its two halves are the axes of its planes."""
    (width,), half = x.shape, x.shape[0] // heads // 2
    x = b.reshape(name, x, heads, 2 * half)
    one, two = (b.part(name, x, 1, i * half, half) for i in range(2))
    turned = (
        b.apply("Sub", name, b.apply("Mul", name, one, cos), b.apply("Mul", name, two, sin)),
        b.apply("Add", name, b.apply("Mul", name, two, cos), b.apply("Mul", name, one, sin)),
    )
    both = b.node("Concat", name, [t.name for t in turned], (heads, 2 * half), axis=-1)
    return b.reshape(name, both, width)


NET = Net(_build, quantized=True)
