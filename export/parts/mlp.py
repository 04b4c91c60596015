"""The connector of several linear maps."""

from __future__ import annotations

from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule
from edgevlm.parts.mlp import Mlp


class MlpModule(ConnectorModule):
    """See edgevlm/parts/mlp.py; its layers have numbers as names."""

    def __init__(self, config: Mlp) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(config.in_features, config.out_features))
        for i in range(1, config.depth):
            self.add_module(str(2 * i - 1), nn.GELU())
            self.add_module(str(2 * i), nn.Linear(config.out_features, config.out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, rows, in] -> embeddings [n, rows, out]."""
        for layer in self.children():
            features = layer(features)
        return features


build = MlpModule
