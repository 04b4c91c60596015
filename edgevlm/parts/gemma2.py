"""Gemma 2's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Decoder, Shapes


@dataclass(frozen=True, kw_only=True)
class Gemma2(Decoder):
    """A Gemma 2: as Gemma, with four norms a layer and a cap on the scores, None for no cap."""

    architecture: ClassVar[str] = "gemma2"

    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None

    def tensors(self) -> Shapes:
        """See Part."""
        return self.gated(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
