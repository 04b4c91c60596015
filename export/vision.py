"""The vision encoder and the projector: safetensors -> torch modules -> ONNX.

The only module that imports optimum. The modules themselves are in towers.py and connectors.py;
what a file on disk becomes afterwards is onnx_files.py's business.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import EngineMissing
from edgevlm.export.parts import Part
from edgevlm.export.progress import Stage
from edgevlm.family import Config

try:
    import torch
    from optimum.exporters.onnx import OnnxConfig, export
    from optimum.utils import NormalizedConfig
    from torch import nn
    from transformers import PretrainedConfig

    from edgevlm.export.connectors import CONNECTORS, Linear
    from edgevlm.export.qformer import QFormer
    from edgevlm.export.towers import TOWERS, Tower
except ImportError as e:
    raise EngineMissing(
        f"export needs torch, transformers and optimum-onnx ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

# The first opset with LayerNormalization is 17; 18 is optimum's default and every onnxruntime
# that edgevlm accepts has all of it.
OPSET = 18

Array = NDArray[np.float32]


def build_encoder(config: Config, part: Part, stage: Stage) -> Tower:
    """The encoder with the checkpoint's weights, float32."""
    with torch.device("meta"):
        encoder = TOWERS[config["kind"]](config)
    _load(encoder.tower, part, stage)
    encoder.loaded()
    return encoder.eval()


def build_projector(config: Config, part: Part, stage: Stage) -> nn.Module:
    """The projector with the checkpoint's weights, float32."""
    with torch.device("meta"):
        projector = CONNECTORS[config["kind"]](config)
    _load(projector, part, stage)
    if isinstance(projector, (Linear, QFormer)):
        projector.loaded()
    return projector.eval()


def _load(module: nn.Module, part: Part, stage: Stage) -> None:
    state = {}
    for name, tensor in part.items():
        values = tensor.float32()
        state[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
        stage.advance(1)
    module.load_state_dict(state, strict=True, assign=True)


class _PartOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """optimum's description of a module with one input and one output, batch axis dynamic."""

    DEFAULT_ONNX_OPSET = OPSET
    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    names: tuple[str, str]

    def __init__(self, config: Any, shape: tuple[int, ...]) -> None:
        super().__init__(config, task="feature-extraction")
        self.shape = shape

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {self.names[0]: {0: "n"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return OrderedDict({self.names[1]: {0: "n"}})

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        # One row: at 896 pixels the attention of each further one takes gigabytes.
        values = torch.rand((1, *self.shape), generator=generator) * 2 - 1
        return {self.names[0]: values if framework == "pt" else values.numpy()}


class EncoderOnnxConfig(_PartOnnxConfig):
    """pixels -> features."""

    names = ("pixels", "features")


class ProjectorOnnxConfig(_PartOnnxConfig):
    """features -> embeddings."""

    names = ("features", "embeddings")


def trace_encoder(encoder: Tower, path: Path) -> None:
    """Writes the encoder as float32 ONNX."""
    c = encoder.config
    shape = (c.num_channels, c.image_size, c.image_size)
    with quiet():
        export(encoder, EncoderOnnxConfig(c, shape), path, opset=OPSET)


def trace_projector(projector: nn.Module, config: Config, patches: int, path: Path) -> None:
    """Writes the projector as float32 ONNX for features of that many patches."""
    # optimum reads a config of transformers from the module and sets flags on it.
    made: Any = projector
    made.config = PretrainedConfig()
    with quiet():
        export(
            projector, ProjectorOnnxConfig(made.config, (patches, config["in"])), path, opset=OPSET
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and messages of torch's and optimum's exporters."""
    loggers = [logging.getLogger(n) for n in ("optimum", "torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
