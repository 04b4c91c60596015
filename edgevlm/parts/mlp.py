"""A connector of several linear maps."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class Mlp(Connector):
    """A connector of `depth` linear maps, with exact GELU between them."""

    out_features: int
    depth: int

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = linear_map("0", self.in_features, self.out_features)
        for i in range(1, self.depth):
            shapes |= linear_map(str(2 * i), self.out_features, self.out_features)
        return shapes
