"""InternVL's connector."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule, merged
from edgevlm.parts.merged_mlp import MergedMlp


class MergedMlpModule(ConnectorModule):
    """See edgevlm/parts/merged_mlp.py."""

    def __init__(self, config: MergedMlp) -> None:
        super().__init__()
        self.factor = config.factor
        width = config.in_features * config.factor**2
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, config.out_features)
        self.linear_2 = nn.Linear(config.out_features, config.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> embeddings [n, h * h / factor ** 2, out]."""
        x = self.layer_norm(merged(features, self.factor))
        rows: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return rows


build = MergedMlpModule
