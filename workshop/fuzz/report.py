"""`python -m workshop.fuzz.report FILE`: the table of a report, for docs/fuzzing.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edgevlm import schema


def table(report: Path) -> str:
    """Markdown of the lines that `python -m workshop.fuzz --report` wrote: a target each, added up
    over its runs.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in report.read_text(encoding="utf-8").splitlines():
        run = schema.parsed(line)
        runs.setdefault(run["target"], []).append(run)
    rows = [
        "| target | minutes | inputs | answered | refused | found |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(runs):
        sums = [sum(run[k] for run in runs[name]) for k in ("inputs", "answers", "refusals")]
        minutes = sum(run["minutes"] for run in runs[name])
        found = sum(len(run["findings"]) for run in runs[name])
        numbers = " | ".join(f"{n:,}" for n in sums)
        rows.append(f"| {name} | {minutes:.1f} | {numbers} | {found} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
