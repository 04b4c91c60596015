"""InternViT-300M: transformers' own layers (internvl), positions as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionEmbeddings,
    InternVLVisionEncoder,
)

from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.modules import TowerModule, transformers_config
from edgevlm.parts.internvit import InternVit


class InternVitModule(TowerModule):
    """See edgevlm/parts/internvit.py."""

    def __init__(self, config: InternVit) -> None:
        super().__init__()
        bias = config.attention_bias
        self.config = transformers_config(InternVLVisionConfig, config, attention_bias=bias)
        self.tower = nn.Module()
        self.tower.embeddings = InternVLVisionEmbeddings(self.config)
        self.tower.encoder = InternVLVisionEncoder(self.config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the patches after the last layer."""
        embeddings = self.tower.embeddings
        patches, _ = embeddings.patch_embeddings(pixels)
        first = embeddings.cls_token.expand(patches.shape[0], -1, -1)
        # transformers' own forward resamples positions wherever it is traced.
        x = torch.cat((first, patches), 1) + embeddings.position_embeddings
        features: Tensor = self.tower.encoder(x).last_hidden_state[:, 1:]
        return features


build = InternVitModule

# InternVL's own names (modeling_intern_vit.py) -> transformers'.
_NAMES = {
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.position_embedding": "embeddings.position_embeddings",
    r"embeddings\.patch_embedding\.(.+)": r"embeddings.patch_embeddings.projection.\1",
    r"encoder\.layers\.(\d+)\.norm1\.(.+)": r"encoder.layer.\1.layernorm_before.\2",
    r"encoder\.layers\.(\d+)\.norm2\.(.+)": r"encoder.layer.\1.layernorm_after.\2",
    r"encoder\.layers\.(\d+)\.ls([12])": r"encoder.layer.\1.lambda_\2",
    r"encoder\.layers\.(\d+)\.attn\.proj\.(.+)": r"encoder.layer.\1.attention.projection_layer.\2",
    r"encoder\.layers\.(\d+)\.mlp\.(.+)": r"encoder.layer.\1.mlp.\2",
}
_FUSED = {
    r"encoder\.layers\.(\d+)\.attn\.qkv\.(.+)": tuple(
        rf"encoder.layer.\1.attention.{x}_proj.\2" for x in "qkv"
    )
}


def canonical(found: Weights, _: InternVit) -> Weights:
    """InternVL's own layout: other names, and queries, keys and values fused."""
    return renamed(found, _NAMES, _FUSED)
