"""A float32 graph with its linear maps in 4 bits, in blocks that share a scale and a zero point.

The form is onnxruntime's MatMulNBits. Its own quantizer wants a package with a computer algebra
system and holds all weights at once; here one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from edgevlm.export.onnx import attention, storage
from edgevlm.export.onnx.graph import MICROSOFT

# Rows of a weight that share a scale: the size of llama.cpp's q4_0. Other sizes were not measured.
BLOCK = 32
_LEVELS = 15
_NOTHING = 8  # onnxruntime's zero point where there is no block

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def write(source: Path, target: Path, maps: Mapping[str, tuple[str, str]]) -> None:
    """Writes the stored float32 graph `source` as `target`, with `maps` (node of a MatMul -> names
    of its input and its matrix) in 4 bits.
    """
    model = storage.skeleton(source)
    attention.join(model)
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    nodes = [_product(n, shapes) if n.name in maps else n for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    matrices = {weight for _, weight in maps.values()}
    used = {name for node in nodes for name in node.input}

    def change(name: str, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
        if name in matrices:
            yield from zip(_names(name), rounded(values), strict=True)
        if name in used:
            yield name, values

    storage.rewrite(model, source, target, change)


def steps(weight: Array) -> tuple[Array, Array, Array]:
    """A matrix [k, n] as blocks float32 [n, k / BLOCK, BLOCK], the last one padded with zeros, with
    the smallest value and the step of each block, [n, k / BLOCK, 1].
    """
    padded = np.pad(weight, ((0, -len(weight) % BLOCK), (0, 0)))
    blocks = np.ascontiguousarray(padded.T).reshape(weight.shape[1], -1, BLOCK)
    low = np.minimum(blocks.min(2, keepdims=True), 0)
    high = np.maximum(blocks.max(2, keepdims=True), 0)
    return blocks, low, (high - low) / np.float32(_LEVELS)


def rounded(weight: Array) -> tuple[Bytes, Array, Bytes]:
    """A matrix [k, n] as MatMulNBits reads it: values uint8 [n, k / BLOCK, BLOCK / 2], two in a
    byte; scales float32 [n, k / BLOCK]; zero points uint8, two in a byte.
    """
    blocks, low, step = steps(weight)
    divisor = np.where(step == 0, np.float32(1), step)
    zero = np.clip(np.round(-low / divisor), 0, _LEVELS)
    values = np.clip(np.round(blocks / divisor + zero), 0, _LEVELS)
    values.reshape(len(values), -1)[:, len(weight) :] = 0
    zeros = np.pad(zero[:, :, 0], ((0, 0), (0, zero.shape[1] % 2)), constant_values=_NOTHING)
    return _paired(values), step[:, :, 0], _paired(zeros)


def _paired(values: NDArray[Any]) -> Bytes:
    """Two values in a byte along the last axis, the first in the lower half."""
    halves = values.astype(np.uint8)
    paired: Bytes = halves[..., ::2] | halves[..., 1::2] << np.uint8(4)
    return paired


def _product(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    given, weight = node.input
    k, n = shapes[weight]
    return helper.make_node(
        "MatMulNBits",
        [given, *_names(weight)],
        node.output,
        node.name,
        domain=MICROSOFT,
        K=k,
        N=n,
        bits=4,
        block_size=BLOCK,
        # Products of 8-bit integers, where the provider has them.
        accuracy_level=4,
    )


def _names(weight: str) -> tuple[str, ...]:
    return tuple(f"{weight}.{what}" for what in ("int4", "scale", "zero_point"))
