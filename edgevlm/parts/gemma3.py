"""Gemma 3's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Decoder, Shapes


@dataclass(frozen=True, kw_only=True)
class Gemma3(Decoder):
    """A Gemma 3: as Gemma, with four norms a layer and one of every head's queries and keys.

    Layers whose `everywhere` is true see all positions before them, turned by `rope_theta` as if
    they lay `rope_factor` times nearer; the others see `sliding_window` of them, their own
    included, turned by `rope_local_base_freq`.
    """

    architecture: ClassVar[str] = "gemma3"

    query_pre_attn_scalar: float
    sliding_window: int
    rope_local_base_freq: float
    rope_factor: float = 1.0
    everywhere: tuple[bool, ...] = ()

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = self.gated(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        for i in range(self.num_hidden_layers):
            for part in "qk":
                shapes[f"layers.{i}.self_attn.{part}_norm.weight"] = (self.head_dim,)
        return shapes
