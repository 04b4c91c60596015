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
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._chain = Handle("the sampler", chain, llama.llama_sampler_free)
        for sampler in _chain(sampling, spec.outputs, spec.context_length):
            llama.llama_sampler_chain_add(chain, sampler)
        for row in penalized:
            llama.llama_sampler_accept(chain, row)

    def sample(self) -> int:
        """See TokenSampler."""
        return self._decoder.sample(self._chain.pointer)

    def close(self) -> None:
        """See TokenSampler."""
        self._chain.close()


def _chain(s: Sampling, n_rows: int, window: int) -> list[llama.llama_sampler_p]:
    chain = []
    if s.repetition_penalty != 1.0:
        # Over the whole answer, and not the prompt, as transformers counts with inputs_embeds.
        penalty = s.repetition_penalty
        chain.append(llama.llama_sampler_init_penalties(n_rows, window, penalty, 0.0, 0.0))
    if s.temperature == 0.0:
        return [*chain, llama.llama_sampler_init_greedy()]
    seed = llama.LLAMA_DEFAULT_SEED if s.seed is None else s.seed
    return [
        *chain,
        llama.llama_sampler_init_top_k(s.top_k),
        llama.llama_sampler_init_top_p(s.top_p, 1),
        llama.llama_sampler_init_min_p(s.min_p, 1),
        llama.llama_sampler_init_temp(s.temperature),
        llama.llama_sampler_init_dist(seed),
    ]
