"""The connector of LLaVA-NeXT and LLaVA-OneVision; tiles are joined behind its graph, so the
newline lies beside it.
"""

from __future__ import annotations

from edgevlm.export.parts import Net
from edgevlm.export.parts.mlp import build

NET = Net(build, newline="image_newline")
