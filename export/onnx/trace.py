"""The vision tower and the connector: tensors -> torch modules -> ONNX.

The only module that imports optimum. What a part computes stands in its room (export/parts/);
what a file on disk becomes afterwards is storage.py's business.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgevlm.errors import EngineMissing
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import room
from edgevlm.parts import Connector, VisionTower
from edgevlm.progress import Stage

try:
    import torch
    from optimum.exporters.onnx import OnnxConfig, export
    from optimum.utils import NormalizedConfig

    from edgevlm.export.onnx.modules import PartModule
except ImportError as e:
    raise EngineMissing(
        f"export needs torch, transformers and optimum-onnx ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

# The first opset with LayerNormalization is 17; 18 is optimum's default and every onnxruntime
# that edgevlm accepts has all of it.
OPSET = 18


def build(config: VisionTower | Connector, weights: Weights, stage: Stage) -> PartModule:
    """The module of a part with a checkpoint's weights, float32."""
    make = room(config).build
    with torch.device("meta"):
        module: PartModule = make(config)
    state = {}
    for name, tensor in weights.items():
        values = tensor.float32()
        state[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
        stage.advance(1)
    module.holder.load_state_dict(state, strict=True, assign=True)
    module.loaded()
    return module.eval()


class _PartOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """optimum's description of a module with one input of that shape behind the batch, whose axis
    is dynamic.
    """

    DEFAULT_ONNX_OPSET = OPSET
    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, module: PartModule, shape: tuple[int, ...]) -> None:
        super().__init__(module.config, task="feature-extraction")
        self.names, self.shape = module.names, shape

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


def trace(module: PartModule, shape: tuple[int, ...], path: Path) -> None:
    """Writes a part as float32 ONNX for an input of that shape, without the batch."""
    with quiet():
        export(module, _PartOnnxConfig(module, shape), path, opset=OPSET)


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
