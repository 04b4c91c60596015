"""A report as CSV (for programs) and as Markdown (for people)."""

from __future__ import annotations

import csv
import io

from edgevlm.benchmarks.latency.report import Report
from edgevlm.benchmarks.latency.sections import Section, sections, title, warnings

_STATISTICS = ("median", "min", "max", "p90", "p99", "std")


def to_csv(report: Report) -> str:
    """One row for each configuration and metric; the samples stand in the last column."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(
        ("configuration", "model", "metric", "unit", "better", *_STATISTICS, "count", "samples")
    )
    for result in report.results:
        for name, m in result.metrics.items():
            values = (getattr(m, statistic) for statistic in _STATISTICS)
            samples = " ".join(map(repr, m.samples))
            table.writerow((result.name, result.model.name, name, m.unit, m.better, *values,
                            len(m.samples), samples))  # fmt: skip
    return out.getvalue()


def to_markdown(report: Report) -> str:
    """The whole report."""
    parts = [f"# {title(report)}", *(f"> {text}" for text in warnings(report))]
    return "\n\n".join([*parts, *map(section_markdown, sections(report))]) + "\n"


def section_markdown(section: Section) -> str:
    """A heading, paragraphs and a table."""
    parts = [f"## {section.title}", *section.paragraphs]
    if section.head:
        rule = ("---", *("---:" for _ in section.head[1:]))
        parts.append("\n".join(map(_line, (section.head, rule, *section.rows))))
    parts += [f"* {note}" for note in section.notes]
    return "\n\n".join(parts)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
