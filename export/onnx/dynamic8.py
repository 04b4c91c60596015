"""A float32 graph with its linear maps in 8 bits and activations quantized on the fly.

Linear maps are what onnxruntime's quantize_dynamic makes of them, to the bit. That function holds
all weights several times over; here one is in memory at a time, whatever the size of the encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from edgevlm.export.onnx import attention, storage

# Seven-bit weights: on x86 without VNNI, sums of two eight-bit products saturate.
_LARGEST = 64

Array = NDArray[np.float32]


def write(source: Path, target: Path, maps: Mapping[str, tuple[str, str]]) -> None:
    """Writes the stored float32 graph `source` as `target`, with `maps` (node of a MatMul -> names
    of its input and its matrix) in 8 bits.
    """
    # onnxruntime joins more of the float nodes where it is told their shapes.
    model = shape_inference.infer_shapes(storage.skeleton(source))
    attention.join(model)
    nodes = list(_nodes(model.graph.node, maps))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    matrices = {weight for _, weight in maps.values()}
    used = {name for node in nodes for name in node.input}

    def change(name: str, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
        if name in matrices:
            rounded, scale = _rounded(values)
            yield _name(name, "quantized"), rounded
            yield _name(name, "scale"), scale
            yield _name(name, "zero_point"), np.zeros(len(scale), np.int8)
        if name in used:
            yield name, values

    storage.rewrite(model, source, target, change)


def _rounded(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Symmetric 8-bit values of a matrix and the scale of each column, float32 [columns]."""
    peak = np.abs(weight).max(0)
    scale = np.where(peak > 0, peak / np.float32(_LARGEST), np.float32(1))
    return np.round(weight / scale).astype(np.int8), scale


def _nodes(nodes: Collection[Any], maps: Mapping[str, tuple[str, str]]) -> Iterator[Any]:
    quantized: set[str] = set()
    for node in nodes:
        if node.name not in maps:
            yield node
            continue
        given, weight = maps[node.name]
        if given not in quantized:
            # Maps of the same input share its 8-bit values.
            quantized.add(given)
            names = [_name(given, what) for what in ("quantized", "scale", "zero_point")]
            yield helper.make_node("DynamicQuantizeLinear", [given], names, _name(given, "quant"))
        yield from _product(node, given, weight)


def _product(node: Any, given: str, weight: str) -> Iterator[Any]:
    """onnxruntime recognises these four and runs them as one."""
    (output,) = node.output
    product, exact, scale = (_name(output, what) for what in ("product", "exact", "step"))
    values = [_name(name, "quantized") for name in (given, weight)]
    zeros = [_name(name, "zero_point") for name in (given, weight)]
    scales = [_name(name, "scale") for name in (given, weight)]
    yield helper.make_node("MatMulInteger", [*values, *zeros], [product], f"{node.name}.product")
    yield helper.make_node("Cast", [product], [exact], f"{node.name}.exact", to=TensorProto.FLOAT)
    yield helper.make_node("Mul", scales, [scale], f"{node.name}.step")
    yield helper.make_node("Mul", [exact, scale], [output], node.name)


def _name(value: str, what: str) -> str:
    return f"{value}.{what}"
