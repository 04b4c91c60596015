"""SigLIP's tower: transformers' own, every patch after the last norm."""

from __future__ import annotations

from torch import Tensor
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer

from edgevlm.export.onnx.modules import IndexedTower, transformers_config
from edgevlm.parts.siglip import SiglipTower


class SiglipModule(IndexedTower):
    """See edgevlm/parts/siglip.py."""

    def __init__(self, config: SiglipTower) -> None:
        super().__init__()
        self.config = transformers_config(SiglipVisionConfig, config, vision_use_head=False)
        self.tower = SiglipVisionTransformer(self.config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last norm."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


build = SiglipModule
