"""EVA's vision tower as BLIP-2 has it."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class EvaTower(VisionTower):
    """EVA with fused queries, keys and values and a norm after the last layer; the class token's
    row is the first.

    `positions` is the side of the grid that the checkpoint has position rows for.
    """

    positions: int
    final_norm_eps: float

    @property
    def rows(self) -> int:
        """See VisionTower."""
        return self.grid**2 + 1

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        shapes: Shapes = {
            "embeddings.class_embedding": (1, 1, d),
            "embeddings.patch_embedding.weight": (d, self.num_channels, patch, patch),
            "embeddings.patch_embedding.bias": (d,),
            "embeddings.position_embedding": (1, 1 + self.positions**2, d),
        }
        for i in range(self.num_hidden_layers):
            p = f"encoder.layers.{i}."
            shapes |= layer_norm(f"{p}layer_norm1", d) | layer_norm(f"{p}layer_norm2", d)
            shapes |= linear_map(f"{p}self_attn.qkv", d, 3 * d)
            shapes |= linear_map(f"{p}self_attn.projection", d, d)
            shapes |= linear_map(f"{p}mlp.fc1", d, mlp) | linear_map(f"{p}mlp.fc2", mlp, d)
        return shapes | layer_norm("post_layernorm", d)
