"""A dual encoder's side of pictures: a vision tower, a head, and a row of length 1."""

from __future__ import annotations

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import unit
from edgevlm.export.parts import Net, net, room
from edgevlm.parts.picture_encoder import PictureEncoder


def _build(b: Builder, config: PictureEncoder, pixels: Value) -> Value:
    features = net(config.tower).build(b, config.tower, pixels)
    return unit(b, "row", net(config.head).build(b, config.head, features))


NET = Net(_build, quantized=True)


def canonical(found: Weights, config: PictureEncoder) -> Weights:
    """The layouts that the tower's room and the head's know."""
    for part in (config.tower, config.head):
        found = room(part).canonical(found, part)
    return found
