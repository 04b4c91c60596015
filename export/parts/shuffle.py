"""Idefics3's and SmolVLM's connector."""

from __future__ import annotations

from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule, merged
from edgevlm.parts.shuffle import Shuffle


class ShuffleModule(ConnectorModule):
    """See edgevlm/parts/shuffle.py."""

    def __init__(self, config: Shuffle) -> None:
        super().__init__()
        self.factor = config.factor
        self.proj = nn.Linear(config.in_features * config.factor**2, config.out_features, False)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
        rows: Tensor = self.proj(merged(features, self.factor))
        return rows


build = ShuffleModule
