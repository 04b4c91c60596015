"""CLIP's vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, encoder_layer, layer_norm


@dataclass(frozen=True, kw_only=True)
class ClipTower(VisionTower):
    """CLIP up to the layer whose output is read; no final norm, no head.

    `class_token` says whether the class token's row is read with the patches'.
    """

    class_token: bool = False

    @property
    def rows(self) -> int:
        """See VisionTower."""
        return self.grid**2 + self.class_token

    def tensors(self) -> Shapes:
        """See Part."""
        d, patch = self.hidden_size, self.patch_size
        shapes: Shapes = {
            "embeddings.class_embedding": (d,),
            "embeddings.patch_embedding.weight": (d, self.num_channels, patch, patch),
            "embeddings.position_embedding.weight": (self.grid**2 + 1, d),
        }
        shapes |= layer_norm("pre_layrnorm", d)
        for i in range(self.num_hidden_layers):
            shapes |= encoder_layer(f"encoder.layers.{i}.", d, self.intermediate_size)
        return shapes


# Defaults of transformers' CLIPVisionConfig (4.57), which a config.json omits.
CLIP_TOWER = ClipTower(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
