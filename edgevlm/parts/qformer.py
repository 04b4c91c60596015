"""BLIP-2's Q-Former as a connector."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from edgevlm.parts import Connector, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class QFormer(Connector):
    """Learned queries that attend to one another and, in every layer whose number is a multiple of
    `cross_attention_frequency`, to the features; then linear maps to the decoder's width.

    `widths` are what the maps lead to, the decoder's last. The branch for text is left out.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    cross_attention_frequency: int
    layer_norm_eps: float
    queries: int
    widths: tuple[int, ...]

    def tokens(self, rows: int) -> int:
        """See Connector."""
        return self.queries

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp = self.hidden_size, self.intermediate_size
        shapes: Shapes = {"query_tokens": (1, self.queries, d)} | layer_norm("layernorm", d)
        for i in range(self.num_hidden_layers):
            p = f"encoder.layer.{i}."
            shapes |= _attention(f"{p}attention", d, d)
            if i % self.cross_attention_frequency == 0:
                shapes |= _attention(f"{p}crossattention", d, self.in_features)
            shapes |= linear_map(f"{p}intermediate_query.dense", d, mlp)
            shapes |= linear_map(f"{p}output_query.dense", mlp, d)
            shapes |= layer_norm(f"{p}output_query.LayerNorm", d)
        for i, (columns, rows) in enumerate(pairwise((d, *self.widths))):
            shapes |= linear_map(f"maps.{i}", columns, rows)
        return shapes


def _attention(prefix: str, d: int, columns: int) -> Shapes:
    shapes = linear_map(f"{prefix}.attention.query", d, d)
    shapes |= linear_map(f"{prefix}.attention.key", columns, d)
    shapes |= linear_map(f"{prefix}.attention.value", columns, d)
    return (
        shapes
        | linear_map(f"{prefix}.output.dense", d, d)
        | layer_norm(f"{prefix}.output.LayerNorm", d)
    )
