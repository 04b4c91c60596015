"""Further attempts after passing failures: cut connections, a hub that is busy or asks to wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from edgevlm.hub.refusals import FULL, status, transport
from edgevlm.progress import Report, Stage

T = TypeVar("T")

# Seconds before each further attempt. One cut connection costs nothing; somebody whose network
# is gone is told within a quarter of a minute.
PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)
# A hub that asks for a longer wait, or again and again, means: come back another time.
_LONGEST_S = 600
_WAITS = 5
_BUSY = (408, 429, 500, 502, 503, 504)
_TICK_S = 1.0


def persistently(
    action: Callable[[], T],
    report: Report | None = None,
    done: Callable[[], int] = lambda: 0,
    pauses: Sequence[float] = PAUSES_S,
) -> T:
    """Calls `action` until it succeeds, or fails for good: where trying again is no use, or after a
    failure for each of the pauses between which `done`, in bytes, did not grow. A hub that asks to
    wait is waited for in any case. Raises what it raised last.
    """
    failures, before = 0, done()
    while True:
        try:
            return action()
        except transport() as e:
            if not _passing(e):
                raise
            now = done()
            failures = 1 if now > before else failures + 1
            before = max(before, now)
            asked = _asked(e)
            if asked is None and failures > len(pauses):
                raise
            if asked is not None and (failures > _WAITS or asked > _LONGEST_S):
                raise
            _wait(pauses[failures - 1] if asked is None else asked, report)


def _wait(seconds: float, report: Report | None) -> None:
    if seconds < _TICK_S:
        time.sleep(seconds)
        return
    stage = Stage(report, "wait for the hub", round(seconds), "s")
    for _ in range(round(seconds)):
        time.sleep(_TICK_S)
        stage.advance(1)


def _passing(error: BaseException) -> bool:
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        return False
    statuses = [s for e in _chain(error) if (s := status(e)) is not None]
    return all(s in _BUSY for s in statuses)


def _asked(error: BaseException) -> float | None:
    """Seconds that the hub asks to wait, by its Retry-After."""
    for e in _chain(error):
        value = getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", "")
        if value.isdecimal():
            return float(value)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was made of: the client hides a status behind "cannot locate"."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
