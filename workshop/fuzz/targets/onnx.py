"""vision.onnx and projector.onnx of a bundle: a changed one is refused, or the model answers;
nothing outside the bundle is read.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

import edgevlm
from edgevlm.models import built_in
from workshop.fuzz.mutate import damaged
from workshop.fuzz.outcomes import Wrong
from workshop.fuzz.samples import PICTURE, replaced

_FILES = ("projector.onnx", "vision.onnx")
_OUTSIDE = "outside.bin"
_PLACES = (
    *(f"../{_OUTSIDE}", f"./../{_OUTSIDE}", f"x/../../{_OUTSIDE}", "/etc/passwd", "link", ""),
    *("decoder.gguf", "/dev/zero", "..", ".", "x\0y", "\\\\server\\x", "C:\\x", "vision.onnx"),
)
_SIZES = (0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


class Fuzzed:
    """Pico's bundle with another graph."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bundle"
        if not self._folder.exists():
            shutil.copytree(built_in(), self._folder)
            # As many bytes as any initialiser has, so that nothing but the place is wrong.
            (folder / _OUTSIDE).write_bytes(bytes(8 << 20))
            (self._folder / "link").symlink_to(folder / _OUTSIDE)
        self._files = [(built_in() / name).read_bytes() for name in _FILES]

    def case(self, rng: random.Random) -> bytes:
        """See Target; the first byte says which file."""
        which = rng.randrange(2)
        data = self._files[which]
        if rng.random() < 0.3:
            return bytes([which]) + damaged(data, rng, rng.choice((200, 20_000, len(data))))
        model = onnx.load_from_string(data)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(_CHANGES)(model, rng)
        return bytes([which]) + bytes(model.SerializeToString())

    def check(self, data: bytes) -> None:
        """See Target."""
        name = _FILES[data[0] % 2]
        try:
            replaced(self._folder, name, data[1:])
            with edgevlm.load(self._folder, cache=False) as vlm:
                vlm.ask("caption en", PICTURE, max_tokens=2)
        finally:
            replaced(self._folder, name, self._files[data[0] % 2])
        if any(place.encode() in data for place in (_OUTSIDE, "/etc/passwd", "/dev/zero")):
            raise Wrong("values from outside the bundle were taken")


def _elsewhere(model: Any, rng: random.Random) -> None:
    """Says that an initialiser's values lie in a file."""
    tensor = rng.choice(model.graph.initializer)
    size = str(len(tensor.raw_data)) if rng.random() < 0.7 else str(rng.choice(_SIZES))
    said = {
        "location": rng.choice(_PLACES),
        "offset": str(rng.choice((0, 0, *_SIZES))),
        "length": size,
    }
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in said.items():
        if rng.random() < 0.9:
            tensor.external_data.add(key=key, value=value)


def _initialiser(model: Any, rng: random.Random) -> None:
    """Changes an initialiser's name, type, shape or values."""
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(4)
    if kind == 0:
        tensor.name = rng.choice(("", "x", rng.choice(model.graph.initializer).name))
    elif kind == 1:
        tensor.data_type = rng.choice((0, 1, 2, 7, 8, 10, 16, 99))
    elif kind == 2:
        tensor.dims.append(rng.choice(_SIZES))
    else:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def _node(model: Any, rng: random.Random) -> None:
    """Changes a node's operator, domain, inputs or attributes, leaves it out or has it twice."""
    at = rng.randrange(len(model.graph.node))
    node = model.graph.node[at]
    kind = rng.randrange(7)
    if kind == 0:
        node.op_type = rng.choice(("Custom", "Loop", "If", "Scan", "Identity", "ConstantOfShape"))
    elif kind == 1:
        node.domain = rng.choice(("com.microsoft", "custom", "ai.onnx.ml", "com.microsoft.nchwc"))
    elif kind == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "x", *node.output))
    elif kind == 3 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice(_SIZES)
        attribute.ints.extend([rng.choice(_SIZES)] * rng.randrange(3))
    elif kind == 4:
        del model.graph.node[at]
    elif kind == 5:
        model.graph.node.append(node)
    else:
        node.output[0] = rng.choice(("", "x", *rng.choice(model.graph.node).output))


def _model(model: Any, rng: random.Random) -> None:
    """Changes versions, inputs and outputs, or adds functions, a shape or a large constant."""
    kind = rng.randrange(6)
    if kind == 0:
        model.ir_version = rng.choice(_SIZES)
    elif kind == 1:
        model.opset_import.add(domain=rng.choice(("", "custom")), version=rng.choice(_SIZES))
    elif kind == 2:
        sizes = model.graph.input[0].type.tensor_type.shape.dim
        rng.choice(sizes).dim_value = rng.choice(_SIZES)
    elif kind == 3:
        del model.graph.output[:]
    elif kind == 4:
        model.functions.append(onnx.FunctionProto(name="Gelu", domain="com.microsoft"))
    else:
        large = onnx.helper.make_tensor("v", 1, [1], [0.5])
        shape = onnx.helper.make_tensor("large_shape", 7, [2], [2**17, rng.choice((2**17, 2**30))])
        model.graph.initializer.append(shape)
        model.graph.node.insert(
            0, onnx.helper.make_node("ConstantOfShape", ["large_shape"], ["large"], value=large)
        )
        first = model.graph.node[1]
        model.graph.node.append(onnx.helper.make_node("Add", [first.output[0], "large"], ["sum"]))
        model.graph.output.add(name="sum")


_CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    *(_elsewhere, _elsewhere, _initialiser, _node, _node, _model),
)
