"""MobileVLM V2's connector: pooled, positions from one depthwise convolution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule, to_grid
from edgevlm.parts.ldpv2 import LdpV2


class LdpV2Module(ConnectorModule):
    """See edgevlm/parts/ldpv2.py."""

    def __init__(self, config: LdpV2) -> None:
        super().__init__()
        d = config.out_features
        layers = (nn.Linear(config.in_features, d), nn.GELU(), nn.Linear(d, d))
        self.mlp = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.peg = nn.ModuleDict({"peg": nn.Sequential(nn.Conv2d(d, d, 3, 1, 1, groups=d))})

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> embeddings [n, 144, out]."""
        grid = to_grid(self.mlp["mlp"](features))
        # A matrix on either side: the same for every h, where pooling operators want h = 12 k.
        pool = torch.from_numpy(_pooling(math.isqrt(features.shape[1])))
        pooled = pool @ grid @ pool.T
        rows: Tensor = (self.peg["peg"](pooled) + pooled).flatten(2).transpose(1, 2)
        return rows


def _pooling(side: int) -> npt.NDArray[np.float32]:
    """Adaptive average pooling of one axis as a matrix float32 [12, side], by numpy: what torch
    writes into a tensor element by element is traced, element by element.
    """
    n = LdpV2.POOLED
    pool = np.zeros((n, side), np.float32)
    for i in range(n):
        start, end = i * side // n, -(-(i + 1) * side // n)
        pool[i, start:end] = 1 / (end - start)
    return pool


build = LdpV2Module
