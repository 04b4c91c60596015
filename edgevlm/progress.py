"""One long stage and how far it has come."""

from __future__ import annotations

from collections.abc import Callable

from edgevlm.types import Progress

Report = Callable[[Progress], None]


class Stage:
    """Counts what is done of `total` in `unit` and tells the callback, if there is one."""

    def __init__(self, report: Report | None, name: str, total: int, unit: str) -> None:
        self._report = report
        self._name = name
        self._total = total
        self._unit = unit
        self._done = 0
        self.advance(0)

    def advance(self, amount: int) -> None:
        """Adds `amount` to what is done."""
        self.reach(self._done + amount)

    def finish(self) -> None:
        """Says that all is done, whatever was estimated."""
        self.reach(self._total)

    def reach(self, done: int) -> None:
        """Says how much is done in all."""
        self._done = min(done, self._total)
        if self._report:
            self._report(Progress(self._name, self._done, self._total, self._unit))
