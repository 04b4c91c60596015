"""The connector of LLaVA-NeXT and LLaVA-OneVision; tiles are joined behind its graph, so the
newline lies beside it.
"""

from __future__ import annotations

from edgevlm.export.parts import Net
from edgevlm.export.parts.mlp import build

_NEWLINE = "image_newline"

NET = Net(build, newline=(_NEWLINE,), rows=lambda _, tensors: tensors[_NEWLINE].float32())
