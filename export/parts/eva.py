"""EVA's tower: transformers' own (blip_2), positions fitted to the picture's grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2Encoder, Blip2VisionEmbeddings

from edgevlm.export.checkpoint import tensors
from edgevlm.export.checkpoint.computed import stacked, zeros
from edgevlm.export.onnx.modules import TowerModule, transformers_config
from edgevlm.parts.eva import EvaTower


class EvaModule(TowerModule):
    """See edgevlm/parts/eva.py."""

    def __init__(self, config: EvaTower) -> None:
        super().__init__()
        self.grid = config.grid
        self.config = transformers_config(Blip2VisionConfig, config)
        stored = config.positions * config.patch_size
        positioned = transformers_config(Blip2VisionConfig, config, image_size=stored)
        self.tower = nn.Module()
        self.tower.embeddings = Blip2VisionEmbeddings(positioned)
        self.tower.encoder = Blip2Encoder(self.config)
        self.tower.post_layernorm = nn.LayerNorm(config.hidden_size, config.final_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last norm, the class token's row first."""
        x = self.tower.encoder(inputs_embeds=self.tower.embeddings(pixels)).last_hidden_state
        features: Tensor = self.tower.post_layernorm(x)
        return features

    @torch.no_grad()
    def loaded(self) -> None:
        """Fits the positions to the picture's grid, as the original does (eva_vit.py,
        interpolate_pos_embed).
        """
        embeddings, side = self.tower.embeddings, self.grid
        first, grid = embeddings.position_embedding.split([1, embeddings.num_patches], 1)
        if side * side == grid.shape[1]:
            return
        grid = grid.unflatten(1, (round(grid.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        rows = torch.cat((first, grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)
        embeddings.position_embedding = nn.Parameter(rows)


build = EvaModule


def canonical(found: tensors.Weights, config: EvaTower) -> tensors.Weights:
    """eva_vit_g.pth's biases of queries and values, fused with zeros for the keys' between them."""
    out = dict(found)
    for i in range(config.num_hidden_layers):
        stem = f"encoder.layers.{i}.self_attn."
        q, v = found.get(f"{stem}q_bias"), found.get(f"{stem}v_bias")
        if q and v:
            fused = stacked((q, zeros(q, f"{stem}k_bias"), v), q.name)
            del out[f"{stem}q_bias"], out[f"{stem}v_bias"]
            out[f"{stem}qkv.bias"] = fused
    return out
