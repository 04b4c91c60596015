"""The KV cache of pictures and the words before them on disk, for decoders in which those do not
depend on the question.

A decoder gives its KV cache as bytes and takes it back; this module names them by what was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from edgevlm.runtimes.cache import Shelf
from edgevlm.runtimes.engines import Block, TextDecoder

# A KV cache is read and checked in 2 ms and more, and a few rows are read anew as quickly: 64 rows
# take 150 ms in the smallest model that people use, SmolVLM-256M on two cores.
MIN_ROWS = 64


class PrefixCache:
    """KV caches of leading blocks, by all that the blocks hold."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._there = ""

    def recall(self, blocks: Sequence[Block]) -> Callable[[int], memoryview | None]:
        """A function that finds the KV cache of the first n of these blocks; None where there is
        none, or where reading them is as quick.
        """
        names: list[str] = []

        def found(n: int) -> memoryview | None:
            if not _worth(blocks[:n]):
                return None
            names.extend(_names(blocks) if not names else ())
            data = self._shelf.get(names[n - 1])
            self._there = names[n - 1] if data is not None else self._there
            return data

        return found

    def keep(self, decoder: TextDecoder) -> None:
        """Writes the decoder's KV cache of its leading blocks, unless it is there."""
        blocks = decoder.blocks
        if not _worth(blocks):
            return
        name = _names(blocks)[-1]
        if name == self._there:
            return
        state = decoder.state()
        if 0 < len(state) <= self._shelf.max_bytes:
            self._shelf.put(name, state)
        self._there = name

    def forget(self) -> None:
        """Reads no more of what there is."""
        self._there = ""
        self._shelf.forget()


def _worth(blocks: Sequence[Block]) -> bool:
    return sum(len(block.rows) for block in blocks) >= MIN_ROWS


def _names(blocks: Sequence[Block]) -> list[str]:
    """A hash of each block and all before it."""
    digest, names = hashlib.sha256(), []
    for block in blocks:
        digest.update(repr((block.rows.shape, block.attention)).encode())
        digest.update(np.ascontiguousarray(block.rows).data)
        digest.update(np.ascontiguousarray(block.positions).data)
        names.append(digest.hexdigest())
    return names
