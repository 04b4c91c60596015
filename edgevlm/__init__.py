"""edgevlm runs vision-language models on the device in front of you.

>>> import edgevlm
>>> vlm = edgevlm.load()
>>> print(vlm.ask("answer en what shape is red?", image="photo.png"))
circle
>>> vlm.close()

Importing this package loads no engine; the first use of `load`, or of another name that needs one,
does.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from edgevlm.api import load, load_dual
from edgevlm.errors import (
    BenchError,
    BundleCorrupt,
    BundleError,
    BundleNotFound,
    BundleTooNew,
    ChatFileError,
    ContextOverflow,
    EdgeVLMError,
    EngineError,
    EngineMissing,
    ExportError,
    HubError,
    ImageError,
    ModelClosed,
    ParityError,
    PromptError,
    SourceError,
    UnknownFamily,
)
from edgevlm.types import (
    Box,
    Devices,
    LabelScore,
    Piece,
    Placement,
    Point,
    Progress,
    Reply,
    RunSettings,
    Timings,
    TokenCounts,
    TokenLogprob,
)

if TYPE_CHECKING:
    from edgevlm.export import export_bundle
    from edgevlm.photos import PhotoIndex
    from edgevlm.pulling import pull
    from edgevlm.runtimes.answer import Answer
    from edgevlm.runtimes.asynchronous import AsyncAnswer
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.dual import DualEncoder
    from edgevlm.runtimes.messages import Message
    from edgevlm.runtimes.session import VLM
    from edgevlm.video import Video

__version__ = "0.1.0"

# onnxruntime's own wheels report to their maker over the network, and write an identifier into the
# home, unless this is set before they are imported (from 1.29 on, on every system); their thread
# also keeps a forked process from ending. Who sets the variable decides otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Answer",
    "AsyncAnswer",
    "BenchError",
    "Box",
    "BundleCorrupt",
    "BundleError",
    "BundleNotFound",
    "BundleTooNew",
    "Chat",
    "ChatFileError",
    "ContextOverflow",
    "Devices",
    "DualEncoder",
    "EdgeVLMError",
    "EngineError",
    "EngineMissing",
    "ExportError",
    "HubError",
    "ImageError",
    "LabelScore",
    "Message",
    "ModelClosed",
    "ParityError",
    "PhotoIndex",
    "Piece",
    "Placement",
    "Point",
    "Progress",
    "PromptError",
    "Reply",
    "RunSettings",
    "SourceError",
    "Timings",
    "TokenCounts",
    "TokenLogprob",
    "UnknownFamily",
    "VLM",
    "Video",
    "__version__",
    "export_bundle",
    "load",
    "load_dual",
    "pull",
]

_LAZY = {
    "Answer": "edgevlm.runtimes.answer",
    "AsyncAnswer": "edgevlm.runtimes.asynchronous",
    "Chat": "edgevlm.runtimes.chat",
    "DualEncoder": "edgevlm.runtimes.dual",
    "Message": "edgevlm.runtimes.messages",
    "PhotoIndex": "edgevlm.photos",
    "VLM": "edgevlm.runtimes.session",
    "Video": "edgevlm.video",
    "export_bundle": "edgevlm.export",
    "pull": "edgevlm.pulling",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
