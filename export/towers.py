"""Vision towers: transformers' own modules, cut to what the model reads of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig, CLIPVisionConfig, SiglipVisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2Encoder, Blip2VisionEmbeddings
from transformers.models.clip.modeling_clip import CLIPVisionTransformer
from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer

from edgevlm.family import Config

_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class Tower(nn.Module):
    """pixels float32 [n, 3, size, size] -> features float32 [n, patches, width].

    `tower` holds the checkpoint's weights; `config` is transformers'.
    """

    config: Any
    tower: Any

    def loaded(self) -> None:
        """Called when the checkpoint's weights are there."""


class _Indexed(Tower):
    """A tower that looks its positions up by number."""

    def loaded(self) -> None:
        """Gives the tower its numbers, which no checkpoint needs to store."""
        embeddings = self.tower.embeddings
        numbers = torch.arange(embeddings.num_positions).expand((1, -1))
        embeddings.register_buffer("position_ids", numbers, persistent=False)


class Siglip(_Indexed):
    """SigLIP: every patch after the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _config(SiglipVisionConfig, config, vision_use_head=False)
        self.tower = SiglipVisionTransformer(self.config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last norm."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


class Clip(_Indexed):
    """CLIP: the output of its last layer that is kept, without a norm; the class token's row only
    where `class_token` says so.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _config(CLIPVisionConfig, config)
        self.first = 0 if config["class_token"] else 1
        self.tower = CLIPVisionTransformer(self.config)
        self.tower.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the last kept layer."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features[:, self.first :]


class Eva(Tower):
    """EVA as BLIP-2 has it: every row after the last layer, the class token's first, normed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _config(Blip2VisionConfig, config)
        stored = {**config, "image_size": config["positions"] * config["patch_size"]}
        self.tower = nn.Module()
        self.tower.embeddings = Blip2VisionEmbeddings(_config(Blip2VisionConfig, stored))
        self.tower.encoder = Blip2Encoder(self.config)
        self.tower.post_layernorm = nn.LayerNorm(config["hidden_size"], config["final_norm_eps"])

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last norm."""
        x = self.tower.encoder(inputs_embeds=self.tower.embeddings(pixels)).last_hidden_state
        features: Tensor = self.tower.post_layernorm(x)
        return features

    @torch.no_grad()
    def loaded(self) -> None:
        """Fits the positions to the picture's grid, as the original does (eva_vit.py,
        interpolate_pos_embed).
        """
        embeddings, side = self.tower.embeddings, self.config.image_size // self.config.patch_size
        first, grid = embeddings.position_embedding.split([1, embeddings.num_patches], 1)
        if side * side == grid.shape[1]:
            return
        grid = grid.unflatten(1, (round(grid.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        rows = torch.cat((first, grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)
        embeddings.position_embedding = nn.Parameter(rows)


def _config(kind: Any, config: Config, **more: Any) -> Any:
    # transformers leaves its configs without types.
    made = kind(**{key: config[key] for key in _KEYS}, **more)
    made._attn_implementation = "eager"
    return made


TOWERS: dict[str, Callable[[Config], Tower]] = {"siglip": Siglip, "clip": Clip, "eva": Eva}
