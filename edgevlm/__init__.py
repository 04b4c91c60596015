"""edgevlm runs vision-language models on the device in front of you.

    import edgevlm

    vlm = edgevlm.load()
    print(vlm.ask("answer en what colour is the circle?", image="photo.jpg"))

Importing this package loads no engine; `load` does.
"""

import os

from edgevlm.api import load
from edgevlm.errors import (
    BenchError,
    BundleCorrupt,
    BundleError,
    BundleNotFound,
    BundleTooNew,
    ContextOverflow,
    EdgeVLMError,
    EngineError,
    EngineMissing,
    ExportError,
    ImageError,
    ModelClosed,
    ParityError,
    PromptError,
    SourceError,
    UnknownFamily,
)
from edgevlm.types import Box, Devices, Piece, Placement, Progress, Reply, Timings, TokenCounts

__version__ = "0.1.0"

# onnxruntime's own wheels report to their maker over the network, and write an identifier into the
# home, unless this is set before they are imported (from 1.29 on, on every system); their thread
# also keeps a forked process from ending. Who sets the variable decides otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "BenchError",
    "Box",
    "BundleCorrupt",
    "BundleError",
    "BundleNotFound",
    "BundleTooNew",
    "ContextOverflow",
    "Devices",
    "EdgeVLMError",
    "EngineError",
    "EngineMissing",
    "ExportError",
    "ImageError",
    "ModelClosed",
    "ParityError",
    "Piece",
    "Placement",
    "Progress",
    "PromptError",
    "Reply",
    "SourceError",
    "Timings",
    "TokenCounts",
    "UnknownFamily",
    "__version__",
    "load",
]
