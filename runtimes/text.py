"""Tokens' bytes -> text that may be shown: whole characters, nothing that is not the answer's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of an answer and releases what can no longer change.

    A character whose bytes have not all come, and text that may be the start of a stop string, are
    held back. `stopped` is set when a stop string was found; it and what follows are not released.
    With `strip`, neither are blanks around the answer and `role` before it; see AnswerSpec.
    """

    def __init__(self, stop: Sequence[str], *, strip: bool = False, role: str = "") -> None:
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._strip = _Strip(role) if strip else None
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
            return self._release(min(found), last=True)
        n = len(self._held) if end else len(self._held) - self._open_tail()
        return self._release(n, last=end)

    def _release(self, n: int, *, last: bool) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        if self._strip:
            piece = self._strip(piece, last=last)
        self.text += piece
        return piece

    def _open_tail(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        lengths = range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next(
            (n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stop)), 0
        )


class _Strip:
    """str.strip on a text that comes in pieces, after the role that may begin it."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._held = ""
        self._begun = False

    def __call__(self, text: str, *, last: bool) -> str:
        """Adds a piece; returns what is certain to stand between the blanks."""
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
            while self._role and self._held.startswith(self._role):
                self._held = self._held[len(self._role) :].lstrip()
            # Nothing yet, or what may become the role.
            if self._role.startswith(self._held) and not last:
                return ""
            self._begun = True
        n = len(self._held.rstrip())
        piece, self._held = self._held[:n], self._held[n:]
        return piece
