"""The connector of LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes
from edgevlm.parts.mlp import Mlp


@dataclass(frozen=True, kw_only=True)
class Anyres(Mlp):
    """Linear maps, and the newline: a row for the decoder that ends the lines of a picture."""

    def tensors(self) -> Shapes:
        """See Part."""
        return super().tensors() | {"image_newline": (self.out_features,)}
