"""Progress bars for long stages, and what an export says at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from edgevlm.bundle import Bundle
from edgevlm.types import Progress

# The rate is that of the last minutes: a picture may take one.
_RATE_PERIOD_S = 300


def err_console() -> Console:
    """Stderr; names and paths are shown as they are."""
    return Console(stderr=True, markup=False, highlight=False)


def summary(console: Console, bundle: Bundle) -> None:
    """Prints a new bundle's source, parity and size, and the next command."""
    from edgevlm.cli.models import languages_text, parity_table, weight_files_text
    from edgevlm.export.options import uncompared

    if bundle.manifest.weight_files or bundle.manifest.text:
        console.print(weight_files_text(bundle.manifest.weight_files, bundle.manifest.notes))
    else:
        for note in uncompared(bundle.manifest.notes):
            console.print(f"Note: {note}.", soft_wrap=True)
    if bundle.manifest.parity:
        console.print(parity_table(bundle))
    if bundle.manifest.decoder.n_output:
        console.print(f"languages {languages_text(bundle.manifest.decoder)}")
    console.print(f"{bundle.folder}: {mib(bundle.bytes)}")
    command = "classify cat dog" if bundle.manifest.text else "chat"
    console.print(f"Try it: edgevlm {command} -m {bundle.folder} -i PICTURE")


def mib(n_bytes: int) -> str:
    """A size as people read it, of MiB from a tenth on and of GiB.

    >>> mib(5 << 20), mib(3 << 30)
    ('5.0 MiB', '3.0 GiB')
    """
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 1 << 30 else f"{n_bytes / 2**30:.1f} GiB"


class ProgressBars:
    """A progress bar for each stage, with sizes and times."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}", justify="right"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def update(self, progress: Progress) -> None:
        """Moves the stage's bar, making it when the stage is new."""
        if not self._tasks:
            self._bars.start()
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, amount="")
        self._bars.update(
            self._tasks[progress.stage],
            completed=progress.done,
            total=progress.total,
            amount=_amount(progress),
        )


def _amount(progress: Progress) -> str:
    if progress.unit == "B":
        return f"{progress.done / 2**20:.0f}/{progress.total / 2**20:.0f} MiB"
    return f"{progress.done}/{progress.total} {progress.unit}"


class PictureBar:
    """One bar on stderr for many pictures: count, rate and time left. Nothing is shown where stderr
    is not a terminal.
    """

    def __init__(self, total: int, before: int) -> None:
        console = err_console()
        self._bars = Bars(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=_RATE_PERIOD_S,
        )
        self._shown = sys.stderr.isatty() and console.is_terminal
        self._task = self._bars.add_task("", total=total, completed=before, rate="")

    def __enter__(self) -> PictureBar:
        self._start()
        return self

    def _start(self) -> None:
        if self._shown:
            self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._shown:  # Otherwise older rich ends a line that there is not.
            self._bars.stop()

    def advance(self) -> None:
        """Counts a picture."""
        self._bars.advance(self._task)
        speed = self._bars.tasks[0].speed
        if speed:
            rate = f"{speed:.1f} pictures/s" if speed >= 1 else f"{1 / speed:.1f} s a picture"
            self._bars.update(self._task, rate=rate)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The terminal without the bar, for the length of the block."""
        self._stop()
        try:
            yield
        finally:
            self._start()
