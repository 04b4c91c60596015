"""A vision tower or a connector -> a float32 ONNX file, by what its room says.

Neither torch nor transformers is needed: the weights are read as they lie in the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder
from edgevlm.export.parts import net
from edgevlm.parts import Connector, VisionTower
from edgevlm.progress import Stage

_TOWER_ENDS = ("pixels", "features")
_CONNECTOR_ENDS = ("features", "embeddings")


def write(
    config: VisionTower | Connector,
    shape: tuple[int, ...],
    tensors: Weights,
    path: Path,
    stage: Stage,
) -> None:
    """Writes a part for an input of that shape, without the batch; the stage advances by one with
    every tensor. Raises SourceError for a tensor that cannot be read.
    """
    found = net(config)
    given, output = _TOWER_ENDS if isinstance(config, VisionTower) else _CONNECTOR_ENDS
    inside = {name: tensor for name, tensor in tensors.items() if name != found.newline}
    builder = Builder(given, shape, inside, stage.advance)
    builder.write(found.build(builder, config, builder.input), output, path)
