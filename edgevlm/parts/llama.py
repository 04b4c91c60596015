"""LLaMA's and Mistral's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import LM_HEAD, Decoder, Shapes


@dataclass(frozen=True, kw_only=True)
class Llama(Decoder):
    """A LLaMA or Mistral; its output table is its own unless the config ties it.

    `rope_factors` divide the frequencies of the rotary positions, one for each pair of a head's
    dimensions; () leaves them as they are.
    """

    architecture: ClassVar[str] = "llama"

    tie_word_embeddings: bool = False
    rope_factors: tuple[float, ...] = ()

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = self.gated("input_layernorm", "post_attention_layernorm")
        if not self.tie_word_embeddings:
            shapes[LM_HEAD] = (self.vocab_size, self.hidden_size)
        return shapes
