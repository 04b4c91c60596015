"""llama.cpp's sampler chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.native import Handle
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec


class Drawn(Protocol):
    """A decoder that llama.cpp's sampler chains draw from."""

    def sample(self, chain: llama.llama_sampler_p) -> int:
        """Draws from the last logits."""


class LlamaSampler:
    """llama.cpp's sampler chain: penalty, top-k, top-p, min-p, temperature, draw; or greedy.

    `penalized` are rows of the decoder's output matrix.
    """

    def __init__(
        self,
        decoder: Drawn,
        sampling: Sampling,
        spec: DecoderSpec,
        penalized: Sequence[int] = (),
    ) -> None:
        self._decoder = decoder
        greedy = [] if sampling.temperature else [llama.llama_sampler_init_greedy()]
        before = penalties(sampling, spec.outputs, spec.context_length)
        samplers = [*before, *drawing(sampling), *greedy]
        self._chain = chain(samplers, penalized)

    def sample(self) -> int:
        """See TokenSampler."""
        return self._decoder.sample(self._chain.pointer)

    def close(self) -> None:
        """See TokenSampler."""
        self._chain.close()


def chain(samplers: Sequence[llama.llama_sampler_p], penalized: Sequence[int] = ()) -> Handle:
    """A chain of samplers that has accepted the `penalized` tokens."""
    pointer = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    handle = Handle("the sampler", pointer, llama.llama_sampler_free)
    for sampler in samplers:
        llama.llama_sampler_chain_add(pointer, sampler)
    for token in penalized:
        llama.llama_sampler_accept(pointer, token)
    return handle


def penalties(s: Sampling, n: int, window: int) -> list[llama.llama_sampler_p]:
    """The repetition penalty of `n` tokens or rows, where there is one.

    Over the whole answer, and not the prompt, as transformers counts with inputs_embeds.
    """
    if s.repetition_penalty == 1.0:
        return []
    return [llama.llama_sampler_init_penalties(n, window, s.repetition_penalty, 0.0, 0.0)]


def drawing(s: Sampling) -> list[llama.llama_sampler_p]:
    """The samplers of a random draw; none where the likeliest token is taken."""
    if s.temperature == 0.0:
        return []
    seed = llama.LLAMA_DEFAULT_SEED if s.seed is None else s.seed
    return [
        llama.llama_sampler_init_top_k(s.top_k),
        llama.llama_sampler_init_top_p(s.top_p, 1),
        llama.llama_sampler_init_min_p(s.min_p, 1),
        llama.llama_sampler_init_temp(s.temperature),
        llama.llama_sampler_init_dist(seed),
    ]
