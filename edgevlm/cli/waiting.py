"""One line on the terminal while a picture is encoded and the input is read."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable

import click

from edgevlm.types import Progress

_VERBS = {
    "vision": "encoding",
    "prefill": "reading",
    "self-check": "first use here: checking the vision encoder",
}
_MINUTE_S = 60


class StageLine:
    """Shows on stderr, where that is a terminal, the stage that an answer waits for, how far it is
    and the time left; nothing stays of it. An instance is a `progress` of edgevlm's calls.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._start = "", 0.0
        self._shown = False

    def __call__(self, progress: Progress) -> None:
        """Shows how far a stage is; one that is done takes its line away."""
        if progress.done >= progress.total:
            self.erase()
            return
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return
        now = self._clock()
        if progress.stage != self._stage or not progress.done:
            self._stage, self._start = progress.stage, now
        text = stage_text(progress, now - self._start)
        columns = shutil.get_terminal_size().columns
        self._shown = True
        click.echo(f"\r\x1b[K{text[: columns - 1]}", nl=False, err=True)

    def erase(self) -> None:
        """Takes the line away, if it is there."""
        self._stage = ""
        if self._shown:
            self._shown = False
            click.echo("\r\x1b[K", nl=False, err=True)


def stage_text(progress: Progress, seconds: float) -> str:
    """A stage that has run for some seconds as a line; the time left once there is a rate.

    >>> stage_text(Progress("vision", 0, 13, "tiles"), 0.0)
    'encoding 13 tiles'
    >>> stage_text(Progress("vision", 3, 13, "tiles"), 2.4)
    'encoding: 3 of 13 tiles, 8 s left'
    """
    verb = _VERBS.get(progress.stage, progress.stage)
    if progress.total == 1:
        return f"{verb} the picture" if progress.stage == "vision" else verb
    total = f"{progress.total:,} {progress.unit}"
    if not progress.done:
        return f"{verb} {total}"
    left = round(seconds / progress.done * (progress.total - progress.done))
    return f"{verb}: {progress.done:,} of {total}, {_duration(left)} left"


def _duration(seconds: int) -> str:
    if seconds < _MINUTE_S:
        return f"{seconds} s"
    return f"{seconds // _MINUTE_S} min {seconds % _MINUTE_S} s"
