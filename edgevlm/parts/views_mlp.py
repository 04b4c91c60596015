"""Moondream2's connector."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Connector, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class ViewsMlp(Connector):
    """Two linear maps, with GELU's tanh form between them, of two views of a picture side by side:
    rows of its overview and of the map of its tiles, `in_features` together.
    """

    hidden_features: int
    out_features: int

    def tensors(self) -> Shapes:
        """See Part."""
        return linear_map("fc1", self.in_features, self.hidden_features) | linear_map(
            "fc2", self.hidden_features, self.out_features
        )
