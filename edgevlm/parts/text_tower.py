"""The text tower of CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgevlm.parts import ACTIVATIONS, Part, Shapes, encoder_layer, layer_norm

Pooled = Literal["end", "largest", "last"]


@dataclass(frozen=True, kw_only=True)
class TextTower(Part):
    """Token ids [n, tokens] -> unit rows [n, projection_dim].

    `tokens` is the most that it is given, of the `max_position_embeddings` that it has. `causal`
    says whether a position reads only those before it, `pooled` which one is the text's: the first
    that is `end_id`, the one of the `largest` id, or the `last`. `projection_bias` is true of
    SigLIP's map. Raises ValueError for an activation that is not in ACTIVATIONS.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int = 0
    projection_bias: bool = False
    causal: bool = True
    pooled: Pooled = "end"
    end_id: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"the text tower's hidden_act {self.hidden_act!r} is not in {known}")

    def tensors(self) -> Shapes:
        """See Part."""
        d = self.hidden_size
        shapes: Shapes = {
            "embeddings.token_embedding.weight": (self.vocab_size, d),
            "embeddings.position_embedding.weight": (self.max_position_embeddings, d),
            "projection.weight": (self.projection_dim, d),
        }
        if self.projection_bias:
            shapes["projection.bias"] = (self.projection_dim,)
        for i in range(self.num_hidden_layers):
            shapes |= encoder_layer(f"encoder.layers.{i}.", d, self.intermediate_size)
        return shapes | layer_norm("final_layer_norm", d)
