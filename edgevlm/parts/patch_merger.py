"""Qwen2-VL's and Qwen2.5-VL's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class PatchMerger(Connector):
    """A norm, without a mean where it is `gated` as the tower; then `factor` ** 2 rows of features
    that follow one another become one, and two linear maps with exact GELU between them.
    """

    out_features: int
    factor: int
    gated: bool

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return rows // self.factor**2

    def tensors(self) -> Shapes:
        """See Part."""
        d, merged = self.in_features, self.in_features * self.factor**2
        norm: Shapes = {"ln_q.weight": (d,)} if self.gated else layer_norm("ln_q", d)
        first = linear_map("mlp.0", merged, merged)
        return norm | first | linear_map("mlp.2", merged, self.out_features)
