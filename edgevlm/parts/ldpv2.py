"""MobileVLM V2's connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Connector, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class LdpV2(Connector):
    """MobileVLM V2's: two linear maps, pooling to `POOLED` rows and columns whatever the tower's
    grid, and one depthwise convolution.
    """

    POOLED: ClassVar[int] = 12

    out_features: int

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return self.POOLED**2

    def tensors(self) -> Shapes:
        """See Part."""
        d = self.out_features
        shapes = linear_map("mlp.mlp.0", self.in_features, d) | linear_map("mlp.mlp.2", d, d)
        return shapes | {"peg.peg.0.weight": (d, 1, 3, 3), "peg.peg.0.bias": (d,)}
