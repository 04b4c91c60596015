"""Gemma's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Decoder, Shapes


@dataclass(frozen=True, kw_only=True)
class Gemma(Decoder):
    """A Gemma; its output table is its input table."""

    architecture: ClassVar[str] = "gemma"

    def tensors(self) -> Shapes:
        """See Part."""
        return self.gated("input_layernorm", "post_attention_layernorm")
