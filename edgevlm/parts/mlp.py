"""A connector of several linear maps."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, linear_map

_MOST = 64


@dataclass(frozen=True, kw_only=True)
class Mlp(Connector):
    """A connector of `depth` linear maps, with exact GELU between them. Raises ValueError for none
    and for more than any model has.
    """

    out_features: int
    depth: int

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= _MOST:
            raise ValueError(
                f"the connector has {str(self.depth)[:20]} linear maps; 1 to {_MOST} are known"
            )

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = linear_map("0", self.in_features, self.out_features)
        for i in range(1, self.depth):
            shapes |= linear_map(str(2 * i), self.out_features, self.out_features)
        return shapes
