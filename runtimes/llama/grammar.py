"""Tokens among those that a grammar allows, by llama.cpp's grammar sampler.

llama.cpp ends the process where it is made to accept a token that its grammar forbids, and its
chains draw one even where all are forbidden: each is asked about here before it is accepted.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EngineError, PromptError
from edgevlm.runtimes.engines import Float, TokenSampler
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.sampler import Drawn, LlamaSampler, chain, drawing, penalties
from edgevlm.runtimes.native import Handle
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec

# llama.cpp's llama_token_data.
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# Candidates that the grammar is asked about at once, the likeliest first: it is slow for a whole
# vocabulary, and one of the first is nearly always allowed.
_AT_ONCE = (64, 4096)

Candidates = npt.NDArray[np.void]


class Spelled(Drawn, Protocol):
    """A decoder whose tokens a grammar is asked about."""

    @property
    def vocabulary(self) -> GrammarVocabulary:
        """Its vocabulary as grammars see it."""

    def piece(self, token: int) -> bytes:
        """See TextDecoder."""

    def rows(self, tokens: Sequence[int]) -> list[int]:
        """Rows of the output matrix of those tokens that have one."""

    def logits(self) -> Float:
        """See TextDecoder."""


def sampler(
    decoder: Spelled,
    sampling: Sampling,
    spec: DecoderSpec,
    penalized: Sequence[int],
    grammar: str,
    stop: Sequence[int],
) -> TokenSampler:
    """See TextDecoder.sampler."""
    if not grammar:
        return LlamaSampler(decoder, sampling, spec, decoder.rows(penalized))
    before, draw = penalties(sampling, spec.n_vocab, spec.context_length), drawing(sampling)
    return GrammarSampler(
        decoder,
        grammar,
        stop,
        chain(before, penalized) if before else None,
        chain(draw) if draw else None,
    )


class GrammarSampler:
    """TokenSampler that draws among the tokens that a grammar allows, and takes one of the `stop`
    tokens where the text may end. `penalties` change the logits before that, None where there are
    none; `draw` chooses of what is allowed, None for the likeliest.

    Raises PromptError for a grammar that llama.cpp cannot use, and from `sample` where no token of
    the vocabulary goes on as the grammar needs.
    """

    def __init__(
        self,
        decoder: Spelled,
        grammar: str,
        stop: Sequence[int],
        penalties: Handle | None,
        draw: Handle | None,
    ) -> None:
        self._decoder, self._penalties, self._draw = decoder, penalties, draw
        self._vocabulary = decoder.vocabulary
        self._stop = np.array(sorted(set(stop)), np.int32)
        ggml.log.clear()
        pointer = llama.llama_sampler_init_grammar(
            self._vocabulary.pointer, grammar.encode(), b"root"
        )
        if not pointer:
            raise PromptError(f"llama.cpp cannot use the grammar ({ggml.last_log()})")
        self._grammar = Handle("the sampler", pointer, llama.llama_sampler_free)
        # The bytes of a character may come in several tokens.
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""

    def sample(self) -> int:
        """See TokenSampler."""
        candidates = self._candidates()
        token = self._likeliest(candidates) if self._draw is None else self._drawn(candidates)
        if self._penalties:
            llama.llama_sampler_accept(self._penalties.pointer, token)
        if token not in self._stop:
            llama.llama_sampler_accept(self._grammar.pointer, token)
            self._text += self._utf8.decode(self._decoder.piece(token))
        return token

    def close(self) -> None:
        """See TokenSampler."""
        for handle in (self._grammar, self._penalties, self._draw):
            if handle:
                handle.close()

    def _candidates(self) -> Candidates:
        """All tokens that stand for text of their own and, where the text may end, the stop tokens,
        in the order of their ids.
        """
        logits = self._decoder.logits()
        candidates = _filled(np.arange(len(logits), dtype=np.int32), logits)
        if self._penalties:
            candidates = _applied(self._penalties, candidates)
        spoken = self._vocabulary.spoken.copy()
        spoken[self._stop] = self._may_end()
        return candidates.compress(spoken)

    def _may_end(self) -> bool:
        end = _filled(np.array([self._vocabulary.end], np.int32), np.zeros(1, np.float32))
        return bool(np.isfinite(_applied(self._grammar, end)["logit"][0]))

    def _likeliest(self, candidates: Candidates) -> int:
        logits = candidates["logit"]
        for n in (*_AT_ONCE, len(candidates)):
            n = min(n, len(candidates))
            least = np.partition(logits, -n)[-n] if n else 0
            likely = candidates[logits >= least]
            # Of equal ones the lowest id, as everywhere.
            likely = likely[np.argsort(-likely["logit"], kind="stable")]
            allowed = self._allowed(likely)
            if len(allowed):
                return int(allowed["id"][0])
        raise self._dead_end()

    def _drawn(self, candidates: Candidates) -> int:
        allowed = self._allowed(candidates)
        if not len(allowed):
            raise self._dead_end()
        assert self._draw
        array = _array(allowed)
        llama.llama_sampler_apply(self._draw.pointer, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise EngineError("llama.cpp's sampler chose no token")
        return int(array.data[array.selected].id)

    def _allowed(self, candidates: Candidates) -> Candidates:
        """Those after which the text still fits the grammar, and is text."""
        stop = np.isin(candidates["id"], self._stop)
        fits = stop.copy()
        fits[~stop] = np.isfinite(_applied(self._grammar, candidates[~stop])["logit"])
        before = self._utf8.getstate()
        for i in np.flatnonzero(fits & ~stop):
            fits[i] = self._is_text(self._decoder.piece(int(candidates["id"][i])))
            self._utf8.setstate(before)
        return candidates[fits]

    def _is_text(self, data: bytes) -> bool:
        """True for bytes that may follow: llama.cpp's grammar takes some that no text has."""
        try:
            self._utf8.decode(data)
        except UnicodeDecodeError:
            return False
        return True

    def _dead_end(self) -> PromptError:
        after = f"after {self._text[-40:]!r}" if self._text else "at its beginning"
        return PromptError(
            f"the answer cannot go on {after}: no token of this model's vocabulary is what the "
            "grammar needs there; ask for other words or another form"
        )


class GrammarVocabulary:
    """A decoder's vocabulary as grammars see it.

    `spoken` bool [n_vocab] is true for the tokens whose text is that of the answer: no control
    tokens, and none whose `piece` is another text than the `whole` one that llama.cpp's grammar
    reads. `end` is a token that ends
    an answer for llama.cpp.
    """

    def __init__(
        self, pointer: Any, n: int, piece: Callable[[int], bytes], whole: Callable[[int], bytes]
    ) -> None:
        self.pointer = pointer
        silent = (
            llama.LLAMA_TOKEN_ATTR_CONTROL
            | llama.LLAMA_TOKEN_ATTR_UNKNOWN
            | llama.LLAMA_TOKEN_ATTR_UNUSED
        )
        attributes = [llama.llama_vocab_get_attr(pointer, token) for token in range(n)]
        self.spoken = np.array([not attribute & silent for attribute in attributes])
        for token, attribute in enumerate(attributes):
            if attribute & llama.LLAMA_TOKEN_ATTR_USER_DEFINED:
                self.spoken[token] = piece(token) == whole(token)
        ends = [t for t in range(n) if llama.llama_vocab_is_eog(pointer, t)]
        if not ends:
            raise EngineError("the decoder's vocabulary names no token that ends an answer")
        self.end = ends[0]
        self.spoken[ends] = False


def _filled(ids: npt.NDArray[np.int32], logits: Float) -> Candidates:
    candidates = np.zeros(len(ids), _CANDIDATE)
    candidates["id"], candidates["logit"] = ids, logits
    return candidates


def _array(candidates: Candidates) -> Any:
    """llama.cpp's view of candidates, which must outlive it."""
    data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
    return llama.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


def _applied(sampler: Handle, candidates: Candidates) -> Candidates:
    """The candidates with the logits that a sampler gives them, in their order."""
    candidates = np.ascontiguousarray(candidates)
    if len(candidates):
        llama.llama_sampler_apply(sampler.pointer, ctypes.byref(_array(candidates)))
    return candidates
