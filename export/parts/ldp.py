"""MobileVLM's connector, as torchvision 0.15 and timm build its blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule, to_grid
from edgevlm.parts.ldp import Ldp


class LdpModule(ConnectorModule):
    """See edgevlm/parts/ldp.py: a quarter of the patches come out."""

    def __init__(self, config: Ldp) -> None:
        super().__init__()
        d = config.out_features
        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(config.in_features, d), nn.GELU(), nn.Linear(d, d)
        )
        self.mb_block = nn.Sequential(
            nn.Identity(), _InvertedResidual(config, stride=1), _InvertedResidual(config, stride=2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> embeddings [n, ceil(h / 2)^2, out]."""
        rows: Tensor = self.mb_block(to_grid(self.mlp(features))).flatten(2).transpose(1, 2)
        return rows


class _InvertedResidual(nn.Module):
    """MobileNetV3's block as torchvision 0.15 builds it for equal widths, with channel norms."""

    def __init__(self, config: Ldp, stride: int) -> None:
        super().__init__()
        d = config.out_features
        depthwise = nn.Conv2d(d, d, 3, stride, 1, groups=d, bias=False)
        pointwise = nn.Conv2d(d, d, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, _ChannelNorm(d), nn.Hardswish()),
            _SqueezeExcitation(config),
            nn.Sequential(pointwise, _ChannelNorm(d)),
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.residual else out


class _SqueezeExcitation(nn.Module):
    def __init__(self, config: Ldp) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(config.out_features, config.squeezed, 1)
        self.fc2 = nn.Conv2d(config.squeezed, config.out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gates)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel (timm's LayerNormAct2d without activation)."""

    def __init__(self, d: int) -> None:
        super().__init__(d, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


build = LdpModule
