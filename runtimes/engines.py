"""What the runtime asks of its engines: three protocols, nothing of onnxruntime or llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgevlm.sampling import Sampling

Float = npt.NDArray[np.float32]


class Cancelled(Exception):
    """A native call ended early because `cancel` was called."""


class VisionEncoder(Protocol):
    """Turns pixels into rows that the decoder reads beside its token embeddings."""

    @property
    def provider(self) -> str:
        """What really runs it, in the engine's own words."""

    def features(self, pixels: Float) -> Float:
        """Pixels float32 [n, 3, size, size] -> features float32 [n, patches, width]."""

    def project(self, features: Float) -> Float:
        """Features -> embeddings float32 [n, tokens, n_embd]."""

    def cancel(self) -> None:
        """Ends a running call from another thread; that call raises Cancelled."""

    def close(self) -> None:
        """Frees the engine."""


class TokenSampler(Protocol):
    """Draws tokens from the decoder's last logits."""

    def sample(self) -> int:
        """The next token id; it counts for the repetition penalty from now on."""

    def close(self) -> None:
        """Frees the chain."""


class TextDecoder(Protocol):
    """A language decoder with one sequence of positions."""

    @property
    def bos(self) -> int:
        """The begin-of-sequence token."""

    def tokenize(self, text: str) -> list[int]:
        """Text -> token ids, nothing added; control tokens in the text stay text."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens stand for none."""

    def embed(self, tokens: Sequence[int]) -> Float:
        """Token ids -> rows float32 [n, n_embd]."""

    def prefill(
        self, rows: Float, *, bidirectional: bool, room: int, shared: Sequence[int] = ()
    ) -> int:
        """Reads rows float32 [n, n_embd] from position 0 on, leaving `room` positions after them.

        `shared` are ends, ascending and below n, of blocks that other prompts begin with as well:
        the state of the longest that the last call had too is kept. Returns the rows kept; whether
        any are makes no difference to the logits.
        """

    def clear(self) -> None:
        """Forgets everything, so that the next prefill reads every row."""

    def extend(self, tokens: Sequence[int]) -> Float:
        """Reads tokens causally; returns the logits after each, float32 [n, n_vocab]."""

    def step(self, token: int) -> None:
        """Reads one token."""

    def logits(self) -> Float:
        """Logits after the last position read, float32 [n_vocab]."""

    def rollback(self, n: int) -> None:
        """Forgets all but the first n positions."""

    def sampler(self, sampling: Sampling, penalized: Sequence[int] = ()) -> TokenSampler:
        """A sampler on this decoder's logits, whose repetition penalty counts `penalized` tokens
        from the start.
        """

    def cancel(self) -> None:
        """Ends a running prefill from another thread; that call raises Cancelled."""

    def close(self) -> None:
        """Frees the engine."""
