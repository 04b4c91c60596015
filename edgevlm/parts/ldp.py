"""MobileVLM's connector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class Ldp(Connector):
    """MobileVLM's lightweight downsample projector: two linear maps, then two inverted residual
    blocks, the second with a stride of 2.
    """

    out_features: int

    @property
    def squeezed(self) -> int:
        """Channels between the two convolutions of squeeze and excitation, as torchvision has
        them: a quarter, to a multiple of 8, never below nine tenths of it.
        """
        quarter = self.out_features // 4
        rounded = max(8, (quarter + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * quarter else rounded

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return ((math.isqrt(rows) + 1) // 2) ** 2

    def tensors(self) -> Shapes:
        """See Part."""
        d, few = self.out_features, self.squeezed
        shapes = linear_map("mlp.1", self.in_features, d) | linear_map("mlp.3", d, d)
        for block in ("mb_block.1.block.", "mb_block.2.block."):
            shapes |= {f"{block}0.0.weight": (d, 1, 3, 3), f"{block}2.0.weight": (d, d, 1, 1)}
            shapes |= layer_norm(f"{block}0.1", d) | layer_norm(f"{block}2.1", d)
            shapes |= {f"{block}1.fc1.weight": (few, d, 1, 1), f"{block}1.fc1.bias": (few,)}
            shapes |= {f"{block}1.fc2.weight": (d, few, 1, 1), f"{block}1.fc2.bias": (d,)}
        return shapes
