"""Gemma 3's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes


@dataclass(frozen=True, kw_only=True)
class Pooled(Connector):
    """Gemma 3's: the means of `factor` x `factor` neighbouring rows of features, a norm that scales
    by 1 + weight, and one linear map without a bias.
    """

    out_features: int
    factor: int
    norm_eps: float

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return rows // self.factor**2

    def tensors(self) -> Shapes:
        """See Part."""
        return {
            "mm_soft_emb_norm.weight": (self.in_features,),
            "mm_input_projection_weight": (self.in_features, self.out_features),
        }
