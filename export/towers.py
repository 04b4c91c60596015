"""Vision towers: transformers' own modules, cut to what the model reads of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig
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


class Siglip(Tower):
    """SigLIP: every patch after the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _config(SiglipVisionConfig, config, vision_use_head=False)
        self.tower = SiglipVisionTransformer(self.config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last norm."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


class Clip(Tower):
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


def _config(kind: Any, config: Config, **more: Any) -> Any:
    # transformers leaves its configs without types.
    made = kind(**{key: config[key] for key in _KEYS}, **more)
    made._attn_implementation = "eager"
    return made


TOWERS: dict[str, Callable[[Config], Tower]] = {"siglip": Siglip, "clip": Clip}
