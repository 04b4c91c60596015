"""Counts of a run over many pictures, and what is said of them at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import click

# Failures that are named at the end; the others are counted.
_NAMED = 5


@dataclass
class Tally:
    """Counts of a run, and its first failures."""

    total: int
    before: int
    out: Path | None
    afresh: bool
    answered: int = 0
    cut: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, file: str, reason: str) -> None:
        """Counts a picture without an answer."""
        self.failed += 1
        if len(self.failures) < _NAMED:
            self.failures.append(f"{file}: {reason}")

    def last_words(self) -> str:
        """The way to go on after a signal."""
        count = f"{self.before + self.answered} of {self.total} pictures are answered"
        if self.out:
            command = "the same command without --overwrite" if self.afresh else "the same command"
            return f"edgevlm: {count}; {command} goes on from there ({self.out})"
        return f"edgevlm: {count}; --jsonl OUT keeps answers, and goes on from there"

    def summarize(self) -> None:
        """Says on stderr what was done and what failed; raises Exit(1) if anything did."""
        if self.out:
            before = f", {self.before} were before" if self.before else ""
            click.echo(
                f"{self.answered} answered{before}, {self.failed} failed: {self.out}", err=True
            )
        if self.cut:
            click.echo(f"{self.cut} cut at --max-tokens or a full context.", err=True)
        if self.failed:
            for failure in self.failures:
                click.echo(f"edgevlm: {failure}", err=True)
            if more := self.failed - len(self.failures):
                click.echo(f"edgevlm: and {more} more that failed", err=True)
            raise click.exceptions.Exit(1)
