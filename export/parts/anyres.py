"""The connector of LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.export.parts.mlp import MlpModule
from edgevlm.parts.anyres import Anyres


class AnyresModule(MlpModule):
    """See edgevlm/parts/anyres.py; no graph has the newline, since tiles are joined behind it."""

    def __init__(self, config: Anyres) -> None:
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.empty(config.out_features))

    @property
    def newline(self) -> Tensor:
        """See PartModule."""
        return self.image_newline.detach()


build = AnyresModule
