"""A float32 ONNX file -> the file of a bundle: weights at a precision, large ones beside it.

Knows onnx and onnxruntime's quantizer. Does not know where the graph came from.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import EngineMissing

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise EngineMissing("export needs onnx", 'pip install "edgevlm[export]"') from None

# Weights of more than this lie in a file of their own: onnxruntime maps it instead of parsing it.
EXTERNAL_BYTES = 64 << 20

Array = NDArray[np.float32]


def store(source: Path, target: Path, precision: str, keep_float: Collection[str] = ()) -> None:
    """Writes `source` as `target` at "fp32", "fp16" or "int8".

    "fp16" halves the weights on disk and computes in float32: half-precision sums overflow in
    trained towers, and no CPU is faster with them. "int8" quantizes the weights of every MatMul
    not named in `keep_float`, per output channel, and the activations on the fly.
    """
    if precision == "int8":
        quantized = source.with_name("int8." + source.name)
        _quantize(source, quantized, keep_float)
        source = quantized
    model = onnx.load(str(source))
    if precision == "fp16":
        _halve(model.graph)
    _save(model, target)


def matmuls(path: Path) -> list[str]:
    """Names of the MatMul nodes that multiply by a weight."""
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {i.name for i in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def files(path: Path) -> list[Path]:
    """The files of a stored model, the graph first."""
    data = _data(path)
    return [path, data] if data.exists() else [path]


def run(path: Path, name: str, batch: Array) -> Array:
    """The model's output for a batch, row by row; `name` is its input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = [session.run(None, {name: batch[i : i + 1]})[0] for i in range(len(batch))]
    return np.concatenate(rows)


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _save(model: Any, target: Path) -> None:
    if model.ByteSize() > EXTERNAL_BYTES:
        onnx.save(
            model,
            str(target),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=_data(target).name,
            size_threshold=1024,
        )
        # onnx makes this file for its owner alone.
        _data(target).chmod(target.stat().st_mode)
    else:
        onnx.save(model, str(target))


def _halve(graph: Any) -> None:
    """Stores matrices as float16 with a Cast to float32, which onnxruntime folds when it loads."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, half = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, name + ".fp16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _quantize(source: Path, target: Path, keep_float: Collection[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # Seven-bit weights: on x86 without VNNI, sums of two eight-bit products saturate.
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(keep_float),
            use_external_data_format=source.stat().st_size > EXTERNAL_BYTES,
            extra_options={"MatMulConstBOnly": True},
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer talks through the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.setLevel(level)
