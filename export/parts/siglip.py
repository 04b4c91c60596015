"""SigLIP's tower: transformers' own, every patch after the last norm or without it."""

from __future__ import annotations

from torch import Tensor, nn
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
        if not config.final_norm:
            self.tower.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of every patch."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


build = SiglipModule
