"""Texts and grammars, by llama.cpp itself."""

from __future__ import annotations

from typing import cast

import numpy as np

from edgevlm.errors import PromptError
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.llama.grammar import GrammarSampler
from edgevlm.runtimes.session import VLM


def fits(vlm: VLM, grammar: str, text: str) -> bool:
    """True if llama.cpp's grammar takes the text's tokens one after the other and may end then."""
    decoder = vlm.engines.decoder
    assert isinstance(decoder, LlamaDecoder)
    stop = vlm.manifest.answer.stop_tokens
    script = [*decoder.tokenize(text), stop[0]]
    wanting = cast(LlamaDecoder, _Wanting(decoder, script))
    sampler = GrammarSampler(wanting, grammar, stop, None, None)
    try:
        return all(sampler.sample() == token for token in script)
    except PromptError:  # no token fits
        return False
    finally:
        sampler.close()


class _Wanting:
    """A decoder whose logits want the tokens of a script in turn."""

    def __init__(self, decoder: LlamaDecoder, script: list[int]) -> None:
        self.vocabulary, self.piece = decoder.vocabulary, decoder.piece
        self._left = list(script)

    def logits(self) -> Float:
        """Ten for the next token, less and less for all others."""
        logits = -np.arange(len(self.vocabulary.spoken), dtype=np.float32)
        logits[self._left.pop(0)] = 10
        return logits
