"""InternViT-300M, InternVL's vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class InternVit(VisionTower):
    """InternViT with layer-scale and without a norm after the last layer; the class token's row is
    dropped.

    `attention_bias` says whether queries, keys and values have biases.
    """

    attention_bias: bool

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        patches = "embeddings.patch_embeddings.projection"
        shapes: Shapes = {
            "embeddings.cls_token": (1, 1, d),
            "embeddings.position_embeddings": (1, 1 + self.grid**2, d),
            f"{patches}.weight": (d, self.num_channels, patch, patch),
            f"{patches}.bias": (d,),
        }
        for i in range(self.num_hidden_layers):
            p = f"encoder.layer.{i}."
            shapes |= layer_norm(f"{p}layernorm_before", d) | layer_norm(f"{p}layernorm_after", d)
            shapes |= {f"{p}lambda_1": (d,), f"{p}lambda_2": (d,)}
            for name in ("q_proj", "k_proj", "v_proj"):
                shapes |= linear_map(f"{p}attention.{name}", d, d)
                if not self.attention_bias:
                    del shapes[f"{p}attention.{name}.bias"]
            shapes |= linear_map(f"{p}attention.projection_layer", d, d)
            shapes |= linear_map(f"{p}mlp.fc1", d, mlp) | linear_map(f"{p}mlp.fc2", mlp, d)
        return shapes
