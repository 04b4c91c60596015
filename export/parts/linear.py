"""The connector that is one linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule
from edgevlm.parts.linear import Linear


class LinearModule(ConnectorModule):
    """See edgevlm/parts/linear.py."""

    def __init__(self, config: Linear) -> None:
        super().__init__()
        self.scale = config.scale
        self.linear = nn.Linear(config.in_features, config.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, rows, in] -> embeddings [n, rows, out]."""
        rows: Tensor = self.linear(features)
        return rows

    @torch.no_grad()
    def loaded(self) -> None:
        """Puts the scale into the weights."""
        for parameter in self.parameters():
            parameter.mul_(self.scale)


build = LinearModule
