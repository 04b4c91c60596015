"""Phi-3-Vision's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class HdMlp(Connector):
    """`factor` x `factor` neighbouring rows of features become one, and two linear maps with exact
    GELU between them; `newline` and `separator` are such rows before the maps.
    """

    out_features: int
    factor: int = 2

    @property
    def merged(self) -> int:
        """The width of a row that is made of neighbours."""
        return self.in_features * self.factor**2

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return rows // self.factor**2

    def tensors(self) -> Shapes:
        """See Part."""
        return (
            linear_map("linear_1", self.merged, self.out_features)
            | linear_map("linear_2", self.out_features, self.out_features)
            | {"newline": (self.merged,), "separator": (self.merged,)}
        )
