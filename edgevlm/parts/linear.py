"""A connector that is one linear map."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class Linear(Connector):
    """One linear map; what it makes is multiplied by `scale`."""

    out_features: int
    scale: float = 1.0

    def tensors(self) -> Shapes:
        """See Part."""
        return linear_map("linear", self.in_features, self.out_features)
