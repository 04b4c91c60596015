"""`python -m workshop.fuzz [TARGET...] --minutes N --seed S`: hostile input for targets in turn.

Ends with exit code 1 where anything was found; the inputs lie in the folder --findings, from which
`--replay FILE` tries one again. Each target's numbers are added to the lines of --report.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from workshop.fuzz import targets
from workshop.fuzz.loop import Loop, replay
from workshop.fuzz.outcomes import Tally


@click.command()
@click.argument("names", nargs=-1, metavar="[TARGET]...")
@click.option("--minutes", default=1.0, show_default=True, help="Time for each target.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@click.option("--findings", type=Path, default=Path("build/fuzz"), help="Folder for inputs.")
@click.option("--report", type=Path, help="File that gets a line of JSON for each target.")
@click.option("--replay", "replayed", type=Path, help="One input that is tried again.")
def main(
    names: tuple[str, ...],
    minutes: float,
    seed: int,
    findings: Path,
    report: Path | None,
    replayed: Path | None,
) -> None:
    """Gives hostile input to every target, or to those named."""
    if unknown := sorted({*names} - {*targets.names()}):
        raise click.UsageError(
            f"unknown target {unknown[0]!r}; known: {', '.join(targets.names())}"
        )
    if replayed:
        if len(names) != 1:
            raise click.UsageError("--replay takes the name of one target")
        outcome = replay(names[0], replayed.read_bytes())
        click.echo(f"{outcome.kind}: {outcome.text} {outcome.place}")
        sys.exit(not outcome.well)
    tallies = [_run(name, minutes, seed, findings, report) for name in names or targets.names()]
    sys.exit(any(tally.findings for tally in tallies))


def _run(name: str, minutes: float, seed: int, findings: Path, report: Path | None) -> Tally:
    tally = Loop(name, seed, findings).run(minutes)
    click.echo(f"{name}: {tally.inputs} inputs, {tally.answers} answers, {tally.refusals} refusals")
    for place, found in tally.findings.items():
        click.echo(f"  {found['times']} x {place}: {found['text']} ({found['file']})")
    if report:
        with report.open("a", encoding="utf-8") as file:
            file.write(tally.line + "\n")
    return tally


if __name__ == "__main__":
    main()
