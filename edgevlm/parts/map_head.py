"""SigLIP's head: a learned probe attends to all patches (multi-head attention pooling)."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Head, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class MapHead(Head):
    """A probe that reads the features by attention, and a feed-forward net; no projection."""

    intermediate_size: int
    num_attention_heads: int
    hidden_act: str

    @property
    def width(self) -> int:
        """See Head."""
        return self.hidden_size

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp = self.hidden_size, self.intermediate_size
        shapes: Shapes = {"head.probe": (1, 1, d)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_map(f"head.attention.{name}", d, d)
        shapes |= layer_norm("head.layernorm", d)
        return shapes | linear_map("head.mlp.fc1", d, mlp) | linear_map("head.mlp.fc2", mlp, d)
