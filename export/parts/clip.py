"""CLIP's tower: transformers' own, up to the layer whose output is read."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionTransformer

from edgevlm.export.onnx.modules import IndexedTower, transformers_config
from edgevlm.parts.clip import ClipTower


class ClipModule(IndexedTower):
    """See edgevlm/parts/clip.py."""

    def __init__(self, config: ClipTower) -> None:
        super().__init__()
        self.config = transformers_config(CLIPVisionConfig, config)
        self.first = 0 if config.class_token else 1
        self.tower = CLIPVisionTransformer(self.config)
        self.tower.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the last kept layer, without a norm."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features[:, self.first :]


build = ClipModule
