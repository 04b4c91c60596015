"""ONNX files: loaded, stored as a bundle keeps them, run on the CPU.

Knows onnx and onnxruntime; does not know where a graph came from or what its weights mean.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

# Weights of more than this lie in a file of their own: onnxruntime maps it instead of parsing it.
EXTERNAL_BYTES = 64 << 20
# Smaller tensors stay in the graph: shape inference reads them there.
_INSIDE_BYTES = 1024
_ALIGNMENT = 64  # bytes: a cache line, and more than any vector load asks for

Array = NDArray[np.float32]
Change = Callable[[str, NDArray[Any]], Iterable[tuple[str, NDArray[Any]]]]


def load(path: Path) -> Any:
    """The model (onnx.ModelProto) with all its weights, wherever they lay."""
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        # A mark that onnx leaves behind would make other bytes of the same weights.
        tensor.ClearField("data_location")
    return model


def skeleton(path: Path) -> Any:
    """The model without the weights that lie beside it."""
    return onnx.load(str(path), load_external_data=False)


def save_skeleton(model: Any, target: Path) -> None:
    """Writes a model whose weights lie beside `target` already, or in it."""
    onnx.save(model, str(target))


def save(model: Any, target: Path) -> None:
    """Writes a model, large weights beside it."""
    if _bytes(model) > EXTERNAL_BYTES:
        onnx.save(
            model,
            str(target),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=_data(target).name,
            size_threshold=_INSIDE_BYTES,
        )
        # onnx makes this file for its owner alone.
        _data(target).chmod(target.stat().st_mode)
    else:
        onnx.save(model, str(target))


def store(source: Path, target: Path) -> None:
    """Writes any model on disk as a bundle keeps it, large weights beside it."""
    rewrite(skeleton(source), source, target, lambda name, values: [(name, values)])


def rewrite(model: Any, source: Path, target: Path, change: Change) -> None:
    """Writes `model`, a skeleton of `source` with other nodes, and the weights one at a time: each
    becomes what `change` makes of its name and values.
    """
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    changed = (change(old.name, numpy_helper.to_array(old, str(source.parent))) for old in weights)
    write(model, target, itertools.chain.from_iterable(changed))


def write(model: Any, target: Path, weights: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Writes a model that has no weights, and these by name, one at a time."""
    with _data(target).open("wb") as data:
        for name, values in weights:
            model.graph.initializer.append(_append(name, values, data))
    save_skeleton(model, target)
    if _data(target).stat().st_size <= EXTERNAL_BYTES:
        whole = load(target)
        remove(target)
        save(whole, target)


def _append(name: str, values: NDArray[Any], data: BinaryIO) -> Any:
    """A tensor whose values stand at the end of a file, or in itself where they are few."""
    if values.nbytes < _INSIDE_BYTES:
        return numpy_helper.from_array(values, name)
    data.write(bytes(-data.tell() % _ALIGNMENT))
    tensor = onnx.TensorProto(
        name=name,
        dims=values.shape,
        data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    place = {"location": Path(data.name).name, "offset": data.tell(), "length": values.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    data.write(np.ascontiguousarray(values).data)
    return tensor


def _bytes(model: Any) -> int:
    """Size of the weights; protobuf cannot say it of a whole model beyond 2 GB."""
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)


def files(path: Path) -> list[Path]:
    """The files of a stored model, the graph first."""
    data = _data(path)
    return [path, data] if data.exists() else [path]


def remove(path: Path) -> None:
    """Deletes a stored model."""
    for file in files(path):
        file.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copies a stored model, under another name if `target` has one."""
    if source.name == target.name:
        for file in files(source):
            shutil.copyfile(file, target.with_name(file.name))
    else:
        # The graph names the file of its weights.
        store(source, target)


def input_name(path: Path) -> str:
    """The name of the input of a model that has one."""
    return str(skeleton(path).graph.input[0].name)


def run(path: Path, name: str, batch: NDArray[Any]) -> Array:
    """The model's output for a batch, row by row; `name` is its input."""
    session = _session(path)
    rows = [session.run(None, {name: batch[i : i + 1]})[0] for i in range(len(batch))]
    return np.concatenate(rows)


def run_each(path: Path, name: str, batch: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Every output that is one number, by name and for each row of a batch, float64 [rows]."""
    session = _session(path)
    names = [output.name for output in session.get_outputs() if not output.shape]
    rows = [session.run(names, {name: batch[i : i + 1]}) for i in range(len(batch))]
    return dict(zip(names, np.array(rows, np.float64).T, strict=True))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Nodes that only look at a tensor run at once behind what makes it; in the default order they
    # come last, and all that they look at is kept till then: 1.6 GB more in TinyGPT-V's tower.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # Other engines' threads live in this process, too: spinning workers would take their cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".data")
