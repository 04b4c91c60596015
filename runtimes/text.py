"""Tokens' bytes -> text that may be shown: whole characters, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of an answer and releases what can no longer change.

    A character whose bytes have not all come, and text that may be the start of a stop string, are
    held back. `stopped` is set when a stop string was found; it and what follows are not released.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, data: bytes, *, end: bool = False) -> str:
        """Adds bytes, or ends the answer; returns the text that is released by it."""
        if self.stopped:
            return ""
        self._held += self._utf8.decode(data, end)
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) if end else len(self._held) - self._open_tail())

    def _release(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        self.text += piece
        return piece

    def _open_tail(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        lengths = range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next(
            (n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stop)), 0
        )
