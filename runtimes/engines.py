"""Protocols of the runtime's engines; nothing of onnxruntime or llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EngineError
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec
from edgevlm.types import RunSettings

Float = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
BlockAttention = Literal["causal", "bidirectional"]
# The KV cache of the first n blocks of a prompt as bytes, where somebody kept it.
Recall = Callable[[int], memoryview | None]
# Is told of rows that were read, of all that are to be.
Told = Callable[[int, int], None]


class Cancelled(Exception):
    """A native call ended early because `cancel` was called."""


@dataclass(frozen=True)
class Block:
    """Embeddings that the decoder reads in batches of their own.

    `rows` are float32 [n, n_embd], one position int32 [n] each; of a decoder with M-RoPE int32
    [n, 4], a time, a row, a column and 0. A row sees every block before its own and of that the
    rows up to itself or, where `attention` is bidirectional, all of them.
    """

    rows: Float
    attention: BlockAttention
    positions: Int32

    def same(self, other: Block) -> bool:
        """True if the decoder computes the same from it after the same blocks."""
        return (
            self.attention == other.attention
            and np.array_equal(self.positions, other.positions)
            and np.array_equal(self.rows, other.rows)
        )


def following(start: int, n: int, *, mrope: bool) -> Int32:
    """The positions of n rows of text from `start` on, int32 [n] or, with M-RoPE, [n, 4]."""
    positions = np.arange(start, start + n, dtype=np.int32)
    return positions[:, None] * np.array([1, 1, 1, 0], np.int32) if mrope else positions


def sequential(
    rows: Float, attention: BlockAttention, start: int = 0, *, mrope: bool = False
) -> Block:
    """A block whose rows stand at one position after the other, from `start` on."""
    return Block(rows, attention, following(start, len(rows), mrope=mrope))


def count_rows(blocks: Sequence[Block], spec: DecoderSpec) -> int:
    """The rows of all blocks; raises EngineError for blocks that a decoder cannot read in turn."""
    n, last, mrope = 0, -1, spec.positions == "mrope"
    for block in blocks:
        if len(block.rows) < 1 or block.rows.shape[1:] != (spec.n_embd,):
            raise EngineError(f"rows {block.rows.shape} are not [n, {spec.n_embd}]")
        if block.positions.shape != ((len(block.rows), 4) if mrope else (len(block.rows),)):
            raise EngineError(f"positions {block.positions.shape} are not those of the decoder")
        times = block.positions[:, 0] if mrope else block.positions
        steps = np.diff(times, prepend=last)
        # Those of a picture with M-RoPE are at one time, and what follows it leaves some out.
        if not (steps >= 0 if mrope else steps == 1).all():
            raise EngineError(f"positions from row {n} on do not follow those before them")
        n, last = n + len(block.rows), int(times[-1])
    if n == 0:
        raise EngineError("there are no rows to read")
    return n


class VisionEncoder(Protocol):
    """Turns pixels into image embeddings, which the decoder reads beside its token embeddings."""

    @property
    def provider(self) -> str:
        """The provider that really runs it, in the engine's own words."""

    def features(self, pixels: Float) -> Float:
        """Pixels float32 [n, 3, height, width] -> features float32 [n, patches, width]."""

    def project(self, features: Float) -> Float:
        """Features -> embeddings float32 [n, tokens, n_embd]."""

    def cancel(self) -> None:
        """Ends a running call from another thread; that call raises Cancelled."""

    def release(self) -> None:
        """Frees its weights up to the next call, which loads them again."""

    def close(self) -> None:
        """Frees the engine."""


class MaskDecoder(Protocol):
    """Turns the codes of masks into the masks."""

    def decode(self, codes: npt.NDArray[np.int64]) -> Float:
        """Codes int [n, 16], each 0 to 127 -> float32 [n, 64, 64], above 0 inside of the object."""

    def close(self) -> None:
        """Frees the engine."""


class RegionModel(Protocol):
    """Turns rows of the decoder's last layer into bins of places and sizes, and those into rows
    that it reads.
    """

    def bins(self, hidden: Float) -> Float:
        """A row float32 [n_embd] -> logits [coord_bins + 2 * size_bins]: of places along a side, of
        widths, of heights.
        """

    def rows(self, x: float, width: float, height: float) -> Float:
        """A place and a size in shares of the picture's sides -> rows float32 [2, n_embd], one for
        each.
        """

    def close(self) -> None:
        """Frees the engine."""


class TokenSampler(Protocol):
    """Draws tokens from the decoder's last logits."""

    def sample(self) -> int:
        """The next token id; it counts for the repetition penalty from now on."""

    def close(self) -> None:
        """Frees the chain."""


class TextDecoder(Protocol):
    """A language decoder with one KV cache, for one sequence."""

    @property
    def settings(self) -> RunSettings:
        """Settings that it really runs with."""

    @property
    def bos(self) -> int:
        """The begin-of-sequence token."""

    def tokenize(self, text: str) -> list[int]:
        """Text -> token ids, nothing added; control tokens in the text stay text."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens stand for none."""

    def writes(self, token: int) -> bool:
        """True if an answer can have the token; one that was trimmed has no logits of the others,
        which are -inf.
        """

    def embed(self, tokens: Sequence[int]) -> Float:
        """Token ids -> token embeddings float32 [n, n_embd]."""

    def prefill(
        self,
        blocks: Sequence[Block],
        *,
        room: int,
        recall: Recall | None = None,
        told: Told | None = None,
    ) -> int:
        """Reads blocks from position 0 on, leaving `room` positions after them.

        The KV cache stays for the next call, which reads only what follows the first blocks that
        are the same, or the answer drawn after all of them. `recall` is asked for that of more
        leading blocks, the most first. `told` is called with the rows that were read and all that
        are to be, at first and after each batch, in whatever thread reads. Returns the rows it did
        not read again. Blocks that were kept make no difference to the logits, an answer and blocks
        longer than a window of the decoder's none but rounding. The blocks' arrays may not change
        later.
        """

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks whose KV cache is there for the next prefill."""

    @property
    def reading(self) -> str:
        """All settings that the bits of a KV cache depend on."""

    def state(self) -> memoryview:
        """The KV cache of `blocks`, which `recall` may give back to a decoder of the same file that
        reads the same way.
        """

    def clear(self) -> None:
        """Forgets everything, so that the next prefill reads every row."""

    def extend(self, tokens: Sequence[int]) -> Float:
        """Reads tokens causally; returns the logits after each, float32 [n, n_vocab]."""

    def step(self, token: int) -> None:
        """Reads one token."""

    def watch(self) -> None:
        """Makes `hidden` known from the next prefill on, which costs a little of every token."""

    def hidden(self) -> Float:
        """The last layer's output at the last position read, before its norm, float32 [n_embd]."""

    def step_row(self, row: Float) -> None:
        """Reads an embedding float32 [n_embd] like a token's; no prompt goes on from it."""

    def logits(self) -> Float:
        """Logits after the last position read, float32 [n_vocab]."""

    def rule_out(self, tokens: Sequence[int]) -> None:
        """Makes the last logits of these tokens -inf, so that the next one drawn is another."""

    def rollback(self, n: int) -> None:
        """Forgets all but the first n rows."""

    def sampler(
        self,
        sampling: Sampling,
        penalized: Sequence[int] = (),
        *,
        grammar: str = "",
        stop: Sequence[int] = (),
    ) -> TokenSampler:
        """A sampler on this decoder's logits, whose repetition penalty counts `penalized` tokens
        from the start. With a `grammar` (GBNF) it takes only tokens that fit it, and one of the
        `stop` tokens only where the text may end; raises PromptError where there is none.
        """

    def cancel(self) -> None:
        """Ends a running prefill from another thread; that call raises Cancelled."""

    def release(self) -> None:
        """Frees its weights and KV cache up to the next prefill, which loads them again."""

    def close(self) -> None:
        """Frees the engine."""
