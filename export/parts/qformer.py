"""BLIP-2's Q-Former as a connector: learned queries read the encoder's features.

The branch of it that reads text beside the queries (InstructBLIP) is not built. Facts from
salesforce/LAVIS (blip2_models/Qformer.py) and transformers (models/blip_2), whose names it has.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.export.onnx.modules import ConnectorModule
from edgevlm.parts.qformer import QFormer


class QFormerModule(ConnectorModule):
    """See edgevlm/parts/qformer.py: a stack of post-norm layers over the queries.

    The maps have nothing between them, so `loaded` folds them into one.
    """

    quantized = True

    def __init__(self, config: QFormer) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, d))
        self.layernorm = nn.LayerNorm(d, eps)
        layers = (_Layer(config, i) for i in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        widths = pairwise((d, *config.widths))
        self.maps = nn.ModuleList(nn.Linear(columns, rows) for columns, rows in widths)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, patches, in] -> embeddings [n, queries, out]."""
        x = self.layernorm(self.query_tokens).expand(features.shape[0], -1, -1)
        layers: Any = self.encoder["layer"]  # torch's modules by name have no types
        for layer in layers:
            x = layer(x, features)
        for linear in self.maps:
            x = linear(x)
        rows: Tensor = x
        return rows

    @torch.no_grad()
    def loaded(self) -> None:
        """Folds the maps into one, in float64."""
        maps: Any = self.maps
        first, *others = maps
        weight, bias = first.weight.double(), first.bias.double()
        for linear in others:
            weight = linear.weight.double() @ weight
            bias = linear.weight.double() @ bias + linear.bias.double()
        folded = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        folded.weight, folded.bias = (nn.Parameter(t.float()) for t in (weight, bias))
        self.maps = nn.ModuleList([folded])


class _Layer(nn.Module):
    def __init__(self, config: QFormer, index: int) -> None:
        super().__init__()
        d, mlp = config.hidden_size, config.intermediate_size
        self.attention = _Attention(config, d)
        crosses = index % config.cross_attention_frequency == 0
        self.crossattention = _Attention(config, config.in_features) if crosses else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(d, mlp)})
        self.output_query = _Output(config, mlp)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, features)
        y = F.gelu(self.intermediate_query["dense"](x))
        out: Tensor = self.output_query(y, x)
        return out


class _Attention(nn.Module):
    """Queries attend to `source`; the result is added to them and normed."""

    def __init__(self, config: QFormer, width: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        columns = {"query": d, "key": width, "value": width}
        self.attention = nn.ModuleDict({n: nn.Linear(c, d) for n, c in columns.items()})
        self.output = _Output(config, d)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q = self._split(self.attention["query"](x))
        k = self._split(self.attention["key"](source))
        v = self._split(self.attention["value"](source))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        read = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.output(read, x)
        return out

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class _Output(nn.Module):
    """A linear map, added to what it came from and normed."""

    def __init__(self, config: QFormer, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


build = QFormerModule
