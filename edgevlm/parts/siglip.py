"""SigLIP's vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, encoder_layer, layer_norm


@dataclass(frozen=True, kw_only=True)
class SiglipTower(VisionTower):
    """SigLIP without its pooling head: every patch after the last norm, or without that where
    `final_norm` is off.
    """

    final_norm: bool = True

    def tensors(self) -> Shapes:
        """See Part."""
        d, patch = self.hidden_size, self.patch_size
        shapes: Shapes = {
            "embeddings.patch_embedding.weight": (d, self.num_channels, patch, patch),
            "embeddings.patch_embedding.bias": (d,),
            "embeddings.position_embedding.weight": (self.grid**2, d),
        }
        for i in range(self.num_hidden_layers):
            shapes |= encoder_layer(f"encoder.layers.{i}.", d, self.intermediate_size)
        return shapes | layer_norm("post_layernorm", d) if self.final_norm else shapes


# Defaults of transformers' SiglipVisionConfig (4.57), which a config.json omits.
SIGLIP_TOWER = SiglipTower(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
