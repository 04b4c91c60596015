"""CLIP's head: the class token's row, normed and mapped."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Head, Shapes, layer_norm


@dataclass(frozen=True, kw_only=True)
class ClassRow(Head):
    """The first row after a norm, mapped to `projection_dim` without a bias."""

    projection_dim: int

    @property
    def width(self) -> int:
        """See Head."""
        return self.projection_dim

    def tensors(self) -> Shapes:
        """See Part."""
        shapes: Shapes = {"projection.weight": (self.projection_dim, self.hidden_size)}
        return shapes | layer_norm("post_layernorm", self.hidden_size)
