"""InternVL's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class MergedMlp(Connector):
    """`factor` x `factor` neighbouring rows of features become one, a norm, and two linear maps
    with exact GELU between them.
    """

    out_features: int
    factor: int

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return rows // self.factor**2

    def tensors(self) -> Shapes:
        """See Part."""
        merged = self.in_features * self.factor**2
        return (
            layer_norm("layer_norm", merged)
            | linear_map("linear_1", merged, self.out_features)
            | linear_map("linear_2", self.out_features, self.out_features)
        )
