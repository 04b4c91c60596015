"""Turns of requests, from several threads, at a model's engines. Knows no engine."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgevlm.errors import ModelClosed, PromptError
from edgevlm.runtimes.engines import Cancelled

# An open answer that nobody has drawn from for so long gives up its turn when another thread asks;
# without a limit one that is kept and forgotten would hold up every thread for good.
IDLE_S = 10.0
_PATIENCE_S = 0.05


class Turn:
    """The right of one request to the decoder.

    `thread` is the one that made the request, None once another has drawn from it: a server may
    draw from one answer in many threads. `drawn` is when that last ended, on time.monotonic's
    clock. `cancelled` asks a `cancellable` request to end at its next token.
    """

    def __init__(self, *, cancellable: bool) -> None:
        self.cancellable = cancellable
        self.thread: int | None = threading.get_ident()
        self.begun = False
        self.drawn = 0.0
        self.cancelled = threading.Event()


class Turns:
    """Lets the requests to one model through one at a time, in the order in which they came.

    A request holds its turn until it ends. Another thread's waits for that; the thread that holds
    an open answer and asks something else gives the answer up, since to wait for itself would never
    end, and so does an answer that nobody has drawn from for IDLE_S. An answer that was given up
    raises PromptError at its next step.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[Turn] = deque()
        self._holder: Turn | None = None
        self._stepping: Turn | None = None
        self._inside: list[tuple[int, object]] = []
        self._to_free: Callable[[], None] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """True once the engines may not be used any more, in this process at least."""
        return self._closed or os.getpid() != self._process

    def check(self) -> None:
        """Raises ModelClosed where the engines may not be used."""
        if os.getpid() != self._process:
            raise ModelClosed(
                "the model was loaded before this process was forked; load it again in this one"
            )
        if self._closed:
            raise ModelClosed("the model is closed; load it again")

    @contextmanager
    def using(self) -> Iterator[None]:
        """The engines stay until the end of the block, whatever another thread closes."""
        self.check()
        entry = (threading.get_ident(), object())
        try:
            with self._changed:
                self.check()
                self._inside.append(entry)
            yield
        except Cancelled:
            self.check()  # it is close that ended it
            raise
        finally:
            with self._changed:
                if entry in self._inside:  # an interrupt may have come before
                    self._inside.remove(entry)
                self._free_if_unused()
                self._changed.notify_all()

    @contextmanager
    def step(self, turn: Turn) -> Iterator[None]:
        """A step of a request, which waits for its turn before the first. The decoder is its own
        until the end of the block. Raises ModelClosed, PromptError where it was given up, or
        Cancelled where it was cancelled before its turn came.
        """
        with self.using():
            try:
                with self._changed:
                    self._enter(turn)
                yield
            finally:
                with self._changed:
                    if self._stepping is turn:
                        self._stepping, turn.drawn = None, time.monotonic()
                    self._changed.notify_all()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A request that is one step."""
        turn = Turn(cancellable=False)
        try:
            with self.step(turn):
                yield
        finally:
            self.end(turn)

    def _enter(self, turn: Turn) -> None:
        if self._depth() > 1:
            raise PromptError(
                "the model is asked from within its own answer, by a signal handler; ask afterwards"
            )
        if turn.thread != threading.get_ident():
            turn.thread = None
        if not turn.begun:
            self._wait_for(turn)
        while self._stepping:
            self._changed.wait()
        self.check()
        if self._holder is not turn:
            raise PromptError(
                "this answer cannot go on: the model was asked something else; "
                "finish one answer before the next or load the model twice"
            )
        self._stepping = turn

    def _depth(self) -> int:
        """The number of blocks around this line that use the engines."""
        me = threading.get_ident()
        return sum(thread == me for thread, _ in self._inside)

    def _wait_for(self, turn: Turn) -> None:
        holder = self._holder
        if holder and holder.thread == threading.get_ident():
            self._holder = None
        self._waiting.append(turn)
        try:
            while self._waiting[0] is not turn or self._taken():
                self._changed.wait(self._patience())
                self.check()
                if turn.cancelled.is_set():
                    raise Cancelled
            self._holder, turn.begun = turn, True
        finally:
            self._waiting.remove(turn)
            self._changed.notify_all()

    def _taken(self) -> bool:
        return self._holder is not None and self._patience() != 0.0

    def _patience(self) -> float | None:
        """Seconds until the holder's turn is up, should it stay idle; None where it is at work."""
        # Taken once: the end of an answer that nobody keeps may come at any line.
        holder = self._holder
        if holder is None or self._stepping:
            return None
        return max(0.0, holder.drawn + IDLE_S - time.monotonic())

    def cancel(self, stop: Callable[[], None], turn: Turn | None = None) -> None:
        """Ends an answer at its next token, the one whose turn it is where none is named; where its
        engines are at work they `stop`.
        """
        if self.closed:
            return
        with self._changed:
            turn = turn or self._holder
            if turn and turn.cancellable:
                turn.cancelled.set()
                self._changed.notify_all()
                if turn is self._stepping:
                    stop()

    def end(self, turn: Turn) -> None:
        """Lets the next request have its turn."""
        if os.getpid() == self._process:
            with self._changed:
                if self._holder is turn:
                    self._holder = None
                self._changed.notify_all()

    def close(self, stop: Callable[[], None], free: Callable[[], None]) -> None:
        """Lets no request in from now on, has running ones `stop`, and frees the engines once
        nobody uses them: at once, or, called from within a step, at its end.
        """
        if self.closed:
            return
        with self._changed:
            self._closed, self._to_free = True, free
            self._changed.notify_all()
            self._free_if_unused()
            while self._to_free is not None:
                # Again and again: a call that is only about to begin forgets that it was asked.
                stop()
                if self._depth():
                    return
                self._changed.wait(_PATIENCE_S)

    def _free_if_unused(self) -> None:
        if self._to_free is not None and not self._inside:
            free, self._to_free = self._to_free, None
            free()
