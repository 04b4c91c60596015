"""One decoder file loaded twice: weights in the file's order read the input, re-ordered ones draw
tokens.

llama.cpp's kernels for weights in the file's order read many rows sooner, those for re-ordered
weights one row: docs/measurements.md has the numbers. Both map the same file, so that what the
second adds to the memory is its copy of the weights and a KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgevlm.runtimes.engines import Block, Float, Recall, TokenSampler, Told
from edgevlm.runtimes.llama import grammar as grammars
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.llama.grammar import GrammarVocabulary
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec
from edgevlm.types import RunSettings


class PairedDecoder:
    """TextDecoder on two LlamaDecoders of one file: `reader` reads blocks, and the first token
    after them takes their state to `writer`.
    """

    def __init__(self, reader: LlamaDecoder, writer: LlamaDecoder, spec: DecoderSpec) -> None:
        self._reader, self._writer, self._spec = reader, writer, spec
        self._last = reader

    @property
    def settings(self) -> RunSettings:
        """See TextDecoder."""
        return replace(self._reader.settings, repacking="decode")

    @property
    def bos(self) -> int:
        """See TextDecoder."""
        return self._reader.bos

    def tokenize(self, text: str) -> list[int]:
        """See TextDecoder."""
        return self._reader.tokenize(text)

    def piece(self, token: int) -> bytes:
        """See TextDecoder."""
        return self._reader.piece(token)

    def rows(self, tokens: Sequence[int]) -> list[int]:
        """See LlamaDecoder."""
        return self._reader.rows(tokens)

    def writes(self, token: int) -> bool:
        """See TextDecoder."""
        return self._reader.writes(token)

    def embed(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        return self._reader.embed(tokens)

    def prefill(
        self,
        blocks: Sequence[Block],
        *,
        room: int,
        recall: Recall | None = None,
        told: Told | None = None,
    ) -> int:
        """See TextDecoder."""
        # An answer before this question need not be read if the writer drew it.
        if self._last is self._writer:
            self._last = self._reader
            kept = self._writer.common(blocks)
            if kept > self._reader.common(blocks):
                self._writer.rollback(kept)
                self._writer.hand_over(self._reader)
        return self._reader.prefill(blocks, room=room, recall=recall, told=told)

    @property
    def blocks(self) -> Sequence[Block]:
        """See TextDecoder."""
        return self._reader.blocks

    @property
    def reading(self) -> str:
        """See TextDecoder."""
        return self._reader.reading

    def state(self) -> memoryview:
        """See TextDecoder."""
        return self._reader.state()

    def clear(self) -> None:
        """See TextDecoder."""
        self._last = self._reader
        self._reader.clear()
        self._writer.clear()

    def extend(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        return self._drawing().extend(tokens)

    def step(self, token: int) -> None:
        """See TextDecoder."""
        self._drawing().step(token)

    def _drawing(self) -> LlamaDecoder:
        if self._last is self._reader:
            self._reader.hand_over(self._writer)
            self._last = self._writer
        return self._last

    def watch(self) -> None:
        """See TextDecoder."""
        self._reader.watch()
        self._writer.watch()

    def hidden(self) -> Float:
        """See TextDecoder."""
        return self._last.hidden()

    def step_row(self, row: Float) -> None:
        """See TextDecoder."""
        self._drawing().step_row(row)

    def logits(self) -> Float:
        """See TextDecoder."""
        return self._last.logits()

    def rule_out(self, tokens: Sequence[int]) -> None:
        """See TextDecoder."""
        self._last.rule_out(tokens)

    def rollback(self, n: int) -> None:
        """See TextDecoder."""
        self._last.rollback(n)

    @property
    def vocabulary(self) -> GrammarVocabulary:
        """See LlamaDecoder."""
        return self._reader.vocabulary

    def sampler(
        self,
        sampling: Sampling,
        penalized: Sequence[int] = (),
        *,
        grammar: str = "",
        stop: Sequence[int] = (),
    ) -> TokenSampler:
        """See TextDecoder."""
        return grammars.sampler(self, sampling, self._spec, penalized, grammar, stop)

    def sample(self, chain: llama.llama_sampler_p) -> int:
        """See LlamaDecoder."""
        return self._last.sample(chain)

    def cancel(self) -> None:
        """See TextDecoder."""
        self._reader.cancel()
        self._writer.cancel()

    def release(self) -> None:
        """See TextDecoder."""
        self._last = self._reader
        self._reader.release()
        self._writer.release()

    def close(self) -> None:
        """See TextDecoder."""
        self._writer.close()
        self._reader.close()
