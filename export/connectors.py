"""Projectors: from the encoder's features to the decoder's rows, one torch module for each kind.

A new kind is a class here, its entry in CONNECTORS and its shapes in parts.py; nothing else knows
what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.export.parts import ldp_squeezed
from edgevlm.export.qformer import QFormer
from edgevlm.family import Config

# Rows and columns that MobileVLM V2 pools to, whatever the encoder's grid.
_POOLED = 12


class Linear(nn.Module):
    """One linear map; its weights are multiplied by `scale` once they are loaded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale = config.get("scale", 1.0)
        self.linear = nn.Linear(config["in"], config["out"])

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, patches, in] -> rows [n, patches, out]."""
        rows: Tensor = self.linear(features)
        return rows

    @torch.no_grad()
    def loaded(self) -> None:
        """Puts the scale into the weights."""
        for parameter in self.parameters():
            parameter.mul_(self.scale)


class Mlp(nn.Sequential):
    """Linear maps with exact GELU between them."""

    def __init__(self, config: Config) -> None:
        layers: list[nn.Module] = [nn.Linear(config["in"], config["out"])]
        for _ in range(1, config["depth"]):
            layers += [nn.GELU(), nn.Linear(config["out"], config["out"])]
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, patches, in] -> rows [n, patches, out]; the tracer reads the name."""
        for layer in self:
            features = layer(features)
        return features


class Ldp(nn.Module):
    """MobileVLM's lightweight downsample projector: a quarter of the patches come out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config["out"]
        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(config["in"], d), nn.GELU(), nn.Linear(d, d)
        )
        self.mb_block = nn.Sequential(
            nn.Identity(), _InvertedResidual(d, stride=1), _InvertedResidual(d, stride=2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> rows [n, ceil(h / 2)^2, out]."""
        rows: Tensor = self.mb_block(_to_grid(self.mlp(features))).flatten(2).transpose(1, 2)
        return rows


class _InvertedResidual(nn.Module):
    """MobileNetV3's block as torchvision 0.15 builds it for equal widths, with channel norms."""

    def __init__(self, d: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(d, d, 3, stride, 1, groups=d, bias=False)
        pointwise = nn.Conv2d(d, d, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, _ChannelNorm(d), nn.Hardswish()),
            _SqueezeExcitation(d),
            nn.Sequential(pointwise, _ChannelNorm(d)),
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.residual else out


class _SqueezeExcitation(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(d, ldp_squeezed(d), 1)
        self.fc2 = nn.Conv2d(ldp_squeezed(d), d, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gates)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel (timm's LayerNormAct2d without activation)."""

    def __init__(self, d: int) -> None:
        super().__init__(d, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LdpV2(nn.Module):
    """MobileVLM V2's projector: pooled to 12 x 12, positions from one depthwise convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config["out"]
        layers = (nn.Linear(config["in"], d), nn.GELU(), nn.Linear(d, d))
        self.mlp = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.peg = nn.ModuleDict({"peg": nn.Sequential(nn.Conv2d(d, d, 3, 1, 1, groups=d))})

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, h * h, in] -> rows [n, 144, out]."""
        grid = _to_grid(self.mlp["mlp"](features))
        # A matrix on either side: the same for every h, where pooling operators want h = 12 k.
        pool = _pooling(grid.shape[-1])
        pooled = pool @ grid @ pool.T
        rows: Tensor = (self.peg["peg"](pooled) + pooled).flatten(2).transpose(1, 2)
        return rows


def _pooling(side: int) -> Tensor:
    """Adaptive average pooling of one axis as a matrix [12, side]."""
    pool = torch.zeros(_POOLED, side)
    for i in range(_POOLED):
        start, end = i * side // _POOLED, -(-(i + 1) * side // _POOLED)
        pool[i, start:end] = 1 / (end - start)
    return pool


def _to_grid(rows: Tensor) -> Tensor:
    """[n, h * h, d] -> [n, d, h, h], row by row."""
    side = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).reshape(-1, rows.shape[2], side, side)


CONNECTORS: dict[str, Callable[[Config], nn.Module]] = {
    "linear": Linear,
    "mlp": Mlp,
    "ldp": Ldp,
    "ldpv2": LdpV2,
    "qformer": QFormer,
}
