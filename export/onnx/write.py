"""A tower or a connector -> a float32 ONNX file, by what its room says.

Neither torch nor transformers is needed: the weights are read as they lie in the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder
from edgevlm.export.parts import net
from edgevlm.parts import Connector, Part, VisionTower
from edgevlm.parts.picture_encoder import PictureEncoder
from edgevlm.parts.text_tower import TextTower
from edgevlm.progress import Stage


def write(
    config: VisionTower | Connector | PictureEncoder | TextTower,
    shape: tuple[int, ...],
    tensors: Weights,
    path: Path,
    stage: Stage,
) -> None:
    """Writes a part for an input of that shape, without the batch; the stage advances by one with
    every tensor. Raises SourceError for a tensor that cannot be read.
    """
    found = net(config)
    given, output = _ends(config)
    inside = {name: tensor for name, tensor in tensors.items() if name not in found.newline}
    builder = Builder(given, shape, inside, stage.advance, ids=isinstance(config, TextTower))
    builder.write(found.build(builder, config, builder.input), output, path)


def _ends(config: Part) -> tuple[str, str]:
    """The names of a part's input and output."""
    if isinstance(config, VisionTower):
        return "pixels", "features"
    if isinstance(config, PictureEncoder):
        return "pixels", "embeddings"
    return ("ids", "embeddings") if isinstance(config, TextTower) else ("features", "embeddings")
