"""Idefics3's and SmolVLM's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes


@dataclass(frozen=True, kw_only=True)
class Shuffle(Connector):
    """Idefics3's: `factor` x `factor` neighbouring rows of features become one, and one linear map
    without a bias.
    """

    out_features: int
    factor: int

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return rows // self.factor**2

    def tensors(self) -> Shapes:
        """See Part."""
        return {"proj.weight": (self.out_features, self.in_features * self.factor**2)}
