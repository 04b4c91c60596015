"""Rows of a KV cache, as far as they are known: what the next prefill need not read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgevlm.runtimes.engines import Block, Float, Int32, following, sequential

Embed = Callable[[Sequence[int]], Float]


class CachedRows:
    """Positions of all rows of a KV cache; the blocks that it begins with and the tokens read one
    by one after them. Of M-RoPE's positions `positions` are the times.
    """

    def __init__(self) -> None:
        self.positions: list[int] = []
        self._following: list[int] = []
        self._blocks: list[Block] = []
        self._tokens: list[int] = []
        self._n_leading = 0
        # The first of the blocks that were read in whole batches, as anybody would read them.
        self._n_pure = 0

    @property
    def leading(self) -> Sequence[Block]:
        """All blocks but the last one of a prompt that was read to its end, up to the first that
        goes on from an answer: the rows of an answer were read one by one, which rounds otherwise.
        """
        return self._blocks[: min(self._n_leading, self._n_pure)]

    @property
    def following(self) -> int:
        """The first position behind all rows."""
        return self._following[-1] if self._following else 0

    def read(self, positions: Int32) -> None:
        """Notes rows at these positions, of a block that may not be whole yet."""
        axes = positions.reshape(len(positions), -1)
        self.positions += axes[:, 0].tolist()
        reached = np.maximum.accumulate(axes.max(1) + 1)
        self._following += np.maximum(reached, self.following).tolist()

    def divides(self, n: int) -> bool:
        """True if the first n rows can stay without the rest: of rows at one time, as those of a
        picture with M-RoPE, all stay or none.
        """
        return n >= len(self.positions) or self.positions[n] != self.positions[n - 1]

    def whole(self, blocks: Sequence[Block]) -> None:
        """Notes that these blocks were read, and nothing else."""
        self._blocks, self._tokens = list(blocks), []

    def prompt(self, blocks: Sequence[Block], kept: int) -> None:
        """Notes that a prompt was read to its end, of which the first `kept` rows were there."""
        whole = next(i for i in range(len(blocks)) if _count(blocks[: i + 1]) > kept)
        apart = _count(blocks[:whole]) == kept
        pure = len(blocks) if apart and self._n_pure >= whole else min(self._n_pure, whole)
        self.whole(blocks)
        self._n_leading, self._n_pure = len(blocks) - 1, pure

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> CachedRows:
        """The rows of these leading blocks, and nothing else, as anybody would read them."""
        made = cls()
        for block in blocks:
            made.read(block.positions)
        made.whole(blocks)
        made._n_pure = len(blocks)
        return made

    def drew(self, tokens: Sequence[int], positions: Int32) -> None:
        """Notes tokens read after the blocks."""
        self._tokens += tokens
        self.read(positions)

    def cut(self, n: int) -> None:
        """Notes that all but the first n rows are gone."""
        del self.positions[n:], self._following[n:]
        del self._tokens[max(0, n - _count(self._blocks)) :]
        while self._blocks and _count(self._blocks) > n:
            last = self._blocks.pop()
            self._n_pure = min(self._n_pure, len(self._blocks))
            if (left := n - _count(self._blocks)) > 0:
                self._blocks.append(_first(last, left))
                break
        self._n_leading = min(self._n_leading, len(self._blocks))

    def everything(self, embed: Embed) -> list[Block]:
        """All rows as blocks, the tokens that were read one by one as the last."""
        if not self._tokens:
            return list(self._blocks)
        mrope = self._blocks[0].positions.ndim > 1
        start = int(self._blocks[-1].positions.max()) + 1
        return [*self._blocks, sequential(embed(self._tokens), "causal", start, mrope=mrope)]

    def copy(self) -> CachedRows:
        """Another one that says the same."""
        made = CachedRows()
        made.positions, made._following = list(self.positions), list(self._following)
        made._n_leading, made._n_pure = self._n_leading, self._n_pure
        made._blocks, made._tokens = list(self._blocks), list(self._tokens)
        return made

    def common(self, blocks: Sequence[Block], embed: Embed) -> int:
        """The number of leading rows of a prompt that are there: those of whole blocks, never of
        the last one, and, where the prompt goes on from an answer, of that answer.

        Other prompts that begin alike are read anew from their block's begin, so that the same
        question is computed in the same batches, to the same bits, whatever was asked before it.
        `embed` gives the token embeddings of the tokens that were read one by one.
        """
        n = 0
        for i, (block, known) in enumerate(zip(blocks, self._blocks, strict=False)):
            if i < len(blocks) - 1 and block.same(known):
                n += len(block.rows)
                continue
            both = {block.attention, known.attention}
            if i == len(self._blocks) - 1 and self._tokens and both == {"causal"}:
                rows = _same_rows(block, _longer(known, embed(self._tokens)))
                n += rows if rows > len(known.rows) else 0
            break
        n = min(n, len(self.positions), _count(blocks) - 1)
        while n and not self.divides(n):
            n -= 1
        return n


def _same_rows(block: Block, other: Block) -> int:
    """Rows of a causal block that are the first ones of another, too."""
    n = min(len(block.rows), len(other.rows))
    places = (x.positions[:n].reshape(n, -1) for x in (block, other))
    same = (block.rows[:n] == other.rows[:n]).all(1) & np.equal(*places).all(1)
    return n if same.all() else int(same.argmin())


def _longer(block: Block, rows: Float) -> Block:
    positions = following(int(block.positions.max()) + 1, len(rows), mrope=block.positions.ndim > 1)
    return Block(
        np.concatenate([block.rows, rows]),
        block.attention,
        np.concatenate([block.positions, positions]),
    )


def _first(block: Block, n: int) -> Block:
    return Block(block.rows[:n], block.attention, block.positions[:n])


def _count(blocks: Sequence[Block]) -> int:
    return sum(len(block.rows) for block in blocks)
