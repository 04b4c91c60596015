"""Tables whose rows a graph looks up, in half precision: a text tower's tokens are most of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgevlm.export.onnx import storage

# Smaller ones are not worth a rounding.
_FEWEST_BYTES = 1 << 20
_SUFFIX = ".float16"


def halve(source: Path, target: Path) -> None:
    """Writes the stored float32 graph `source` as `target`, its tables of more than a mebibyte in
    half precision; the rows that are read become float32 again.
    """
    model = storage.skeleton(source)
    large = {i.name for i in model.graph.initializer if _bytes(i) > _FEWEST_BYTES}
    tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"} & large
    nodes = [made for node in model.graph.node for made in _nodes(node, tables)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)

    def change(name: str, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
        yield (name + _SUFFIX, values.astype(np.float16)) if name in tables else (name, values)

    storage.rewrite(model, source, target, change)


def _bytes(tensor: Any) -> int:
    return int(np.prod(tensor.dims)) * 4 if tensor.data_type == TensorProto.FLOAT else 0


def _nodes(node: Any, tables: set[str]) -> Iterator[Any]:
    if node.op_type != "Gather" or node.input[0] not in tables:
        yield node
        return
    rows = node.output[0] + _SUFFIX
    given = [node.input[0] + _SUFFIX, node.input[1]]
    yield helper.make_node("Gather", given, [rows], node.name)
    yield helper.make_node(
        "Cast", [rows], [node.output[0]], f"{node.name}/Cast", to=TensorProto.FLOAT
    )
