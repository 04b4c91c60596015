"""A float32 graph with one input -> the same at another precision, where it stays exact enough.

Every precision goes the same way: the noise that it would bring to each node is estimated, the
noisiest nodes stay in float32, and more of them do until the output is within the precision's
cosine of float32. What differs is a row of `_SCHEMES`: where the noise is seen and how the graph
is written. Works on the stored graph alone, so that a bundle can be converted like a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgevlm.export.onnx import dynamic8, flow, four_bits, storage
from edgevlm.export.parity.metrics import distance
from edgevlm.export.precisions import VisionPrecision, recipe

# The key under which a graph names its nodes that stayed in float32.
FLOAT_KEY = "edgevlm.float32"
_HALF_MAX = 65504.0

Array = NDArray[np.float32]
Noise = dict[str, float]
Flows = Mapping[str, flow.Flow]


@dataclass(frozen=True)
class FloatGraph:
    """A float32 graph on disk: its linear maps (node -> names of input and weight), the pictures
    it is tried on, and what flows through it (tensor -> flow).
    """

    path: Path
    maps: Mapping[str, tuple[str, str]]
    flows: Flows


Write = Callable[[FloatGraph, Path, Collection[str]], None]


@dataclass(frozen=True)
class _Scheme:
    """A precision's recipe: whether its noise needs the flow of every node or of the maps' inputs
    alone, the noise of each node, and the writer that leaves some in float32.
    """

    every_node: bool
    noise: Callable[[FloatGraph], Noise]
    write: Write


def convert(
    source: Path, target: Path, precision: VisionPrecision, pixels: NDArray[Any]
) -> list[str]:
    """Writes the float32 graph `source` as `target` at a precision; returns the nodes left in
    float32.

    `pixels`, a batch of its input, are what it is calibrated and judged on: pictures for a vision
    encoder, their features for a projector, token ids for a text tower.
    """
    scheme = _SCHEMES.get(precision.name)
    if scheme is None:
        storage.store(source, target)
        return []
    graph = _look(source, scheme, pixels)
    name = storage.input_name(source)
    expected = storage.run(source, name, pixels)
    kept: list[str] = []
    for kept in recipe(precision.name).attempts(scheme.noise(graph)):
        storage.remove(target)
        with _quiet():
            scheme.write(graph, target, kept)
        if distance(storage.run(target, name, pixels), expected) <= precision.cosine:
            break
    _note(target, kept)
    return kept


def _note(path: Path, kept: list[str]) -> None:
    model = storage.skeleton(path)
    model.metadata_props.add(key=FLOAT_KEY, value=" ".join(kept))
    storage.save_skeleton(model, path)


def linear_maps(path: Path) -> dict[str, tuple[str, str]]:
    """Node -> (input, weight) of every MatMul that multiplies by a matrix of the file."""
    graph = storage.skeleton(path).graph
    weights = {i.name for i in graph.initializer if len(i.dims) == 2}
    return {
        n.name: (n.input[0], n.input[1])
        for n in graph.node
        if n.op_type == "MatMul" and n.input[1] in weights
    }


def _look(source: Path, scheme: _Scheme, pixels: NDArray[Any]) -> FloatGraph:
    maps = linear_maps(source)
    watched = (
        _outputs(source).values() if scheme.every_node else [given for given, _ in maps.values()]
    )
    return FloatGraph(source, maps, flow.measure(source, watched, pixels))


def _outputs(path: Path) -> dict[str, str]:
    """Node -> its output, for every node that computes on float32 values."""
    model = onnx.shape_inference.infer_shapes(storage.skeleton(path))
    floats = {
        v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return {n.name: n.output[0] for n in model.graph.node if n.output[0] in floats}


def _dynamic_noise(graph: FloatGraph) -> Noise:
    return {n: graph.flows[given].noise(shared=False) for n, (given, _) in graph.maps.items()}


def _static_noise(graph: FloatGraph) -> Noise:
    return {n: graph.flows[given].noise(shared=True) for n, (given, _) in graph.maps.items()}


def _half_noise(graph: FloatGraph) -> Noise:
    """The share of half precision's range that a node's values take: sums must not overflow."""
    return {n: graph.flows[o].peak / _HALF_MAX for n, o in _outputs(graph.path).items()}


def _weight_noise(graph: FloatGraph) -> Noise:
    """Noise over signal of rounding a map's weights to 16 even steps in every block."""
    weights = {i.name: i for i in storage.skeleton(graph.path).graph.initializer}
    noise = {}
    for name, (_, weight) in graph.maps.items():
        values = numpy_helper.to_array(weights[weight], str(graph.path.parent))
        # Zeros fill up the last block; of a narrow matrix it is the only one.
        whole = len(values) // four_bits.BLOCK * four_bits.BLOCK or len(values)
        step = four_bits.steps(values[:whole])[2].astype(np.float64)
        noise[name] = float((step**2).mean() / 12 / max(float((values**2).mean()), 1e-30))
    return noise


def _write_half(graph: FloatGraph, target: Path, keep: Collection[str]) -> None:
    """Weights and arithmetic in float16 between float32 ends.

    A provider without half-precision kernels, as onnxruntime's on x86 processors, widens the
    weights when it loads and computes in float32; GPUs compute as the graph says.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(
        str(graph.path), keep_io_types=True, node_block_list=sorted(keep)
    )
    storage.save(model, target)


def _write_dynamic(graph: FloatGraph, target: Path, keep: Collection[str]) -> None:
    """Weights in 8 bits for each output channel, activations quantized on the fly."""
    maps = {name: parts for name, parts in graph.maps.items() if name not in keep}
    dynamic8.write(graph.path, target, maps)


def _write_static(graph: FloatGraph, target: Path, keep: Collection[str]) -> None:
    """Weights in 8 bits for each output channel, symmetric; inputs in 8 bits at fixed ranges.

    QuantizeLinear and DequantizeLinear stand before each linear map, the form that NPU and OpenVINO
    providers read; what a map makes is not rounded again. Inputs are unsigned with a zero point, as
    QNN and OpenVINO take them; TensorRT, which takes symmetric ones only, is better served by fp16.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    ranges = {
        name: (np.float32(min(f.low.min(), 0)), np.float32(max(f.high.max(), 0)))
        for name, f in graph.flows.items()
    }
    quantizer = QDQQuantizer(
        storage.load(graph.path),
        per_channel=True,
        reduce_range=True,  # as in dynamic8, since processors run this graph, too
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=sorted(graph.maps.keys() - set(keep)),
        nodes_to_exclude=sorted(keep),
        op_types_to_quantize=["MatMul"],
        extra_options={
            "MatMulConstBOnly": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    quantizer.quantize_model()
    storage.save(quantizer.model.model, target)


def _write_four_bits(graph: FloatGraph, target: Path, keep: Collection[str]) -> None:
    """Weights in 4 bits with a scale and zero point for every block."""
    maps = {name: parts for name, parts in graph.maps.items() if name not in keep}
    four_bits.write(graph.path, target, maps)


_SCHEMES = {
    "fp16": _Scheme(True, _half_noise, _write_half),
    "int8": _Scheme(False, _dynamic_noise, _write_dynamic),
    "qdq8": _Scheme(False, _static_noise, _write_static),
    "int4": _Scheme(False, _weight_noise, _write_four_bits),
}


def widen(model: Any) -> None:
    """Turns a graph in half precision (_write_half) into float32, in place: what is left of fp16
    is the rounding of its weights.
    """
    graph = model.graph
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
    del graph.value_info[:]


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizers talk through the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.setLevel(level)
