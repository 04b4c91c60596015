"""Torch modules shared by towers and connectors."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from edgevlm.parts import VisionTower


class PartModule(nn.Module):
    """A part as it is traced: one input and one output, which have these names.

    `config` is what optimum reads and sets flags on, a config of transformers. `quantized` says
    whether bundles have it at the vision precision, which pays from a hundred million weights on;
    otherwise it stays in float32.
    """

    names: ClassVar[tuple[str, str]]
    quantized: ClassVar[bool]
    config: Any

    @property
    def holder(self) -> nn.Module:
        """The module that has the checkpoint's tensors under their canonical names."""
        return self

    @property
    def newline(self) -> Tensor | None:
        """The row float32 [n_embd] that ends the lines of a picture; None in most parts."""
        return None

    def loaded(self) -> None:
        """Called when the checkpoint's weights are there."""


class TowerModule(PartModule):
    """pixels float32 [n, 3, size, size] -> features float32 [n, rows, width].

    `tower` holds the checkpoint's weights.
    """

    names = ("pixels", "features")
    quantized = True
    tower: Any  # transformers leaves its modules without types

    @property
    def holder(self) -> nn.Module:
        """See PartModule."""
        module: nn.Module = self.tower
        return module


class IndexedTower(TowerModule):
    """A tower that looks its positions up by number."""

    def loaded(self) -> None:
        """Gives the tower its numbers, which no checkpoint needs to store."""
        embeddings = self.tower.embeddings
        numbers = torch.arange(embeddings.num_positions).expand((1, -1))
        embeddings.register_buffer("position_ids", numbers, persistent=False)


class ConnectorModule(PartModule):
    """features float32 [n, rows, in] -> image embeddings float32 [n, tokens, n_embd]."""

    names = ("features", "embeddings")
    quantized = False

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()


def transformers_config(kind: Any, tower: VisionTower, **more: Any) -> Any:
    """transformers' config of a class for a tower; it leaves its configs without types."""
    sizes = {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_hidden_layers,
        "num_attention_heads": tower.num_attention_heads,
        "num_channels": tower.num_channels,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.hidden_act,
        "layer_norm_eps": tower.layer_norm_eps,
    }
    made = kind(**sizes | more)
    made._attn_implementation = "eager"
    return made


def to_grid(rows: Tensor) -> Tensor:
    """[n, h * h, d] -> [n, d, h, h], row by row."""
    side = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).reshape(-1, rows.shape[2], side, side)


def merged(rows: Tensor, factor: int) -> Tensor:
    """[n, h * h, d] -> [n, (h / factor) ** 2, factor ** 2 * d]: pixel shuffle, squares of
    neighbours behind one another, row by row.
    """
    side, width = math.isqrt(rows.shape[1]), rows.shape[2]
    cells = side // factor
    grid = rows.reshape(-1, cells, factor, cells, factor, width).transpose(2, 3)
    return grid.reshape(-1, cells * cells, factor * factor * width)
