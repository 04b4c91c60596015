"""Two reports side by side, with verdicts that know the noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgevlm.benchmarks.latency.machine import differences
from edgevlm.benchmarks.latency.report import QUANTITIES, Report, Result
from edgevlm.benchmarks.latency.sections import Section, amount
from edgevlm.benchmarks.latency.stats import Metric
from edgevlm.errors import BenchError

Verdict = Literal["better", "worse", "within noise", "too few samples"]

# Sensors say how a measurement went, not how good a model or a setting is.
_NOT_JUDGED = ("temperature_c", "frequency_mhz")


@dataclass(frozen=True)
class Difference:
    """One metric in two reports; `change` is B over A minus 1."""

    configuration: str
    metric: str
    a: Metric
    b: Metric
    change: float
    verdict: Verdict


def compare(a: Report, b: Report, *, threshold: float, force: bool = False) -> list[Difference]:
    """Judges every metric that both reports have.

    `threshold` is the change, as a part of A, that matters. Without `force`, raises BenchError for
    reports of different machines or different work.
    """
    if not force and (found := differences(a.machine, b.machine)):
        raise BenchError(
            f"the reports are from different machines ({'; '.join(found)}); "
            "--force compares them all the same"
        )
    pairs = list(_pairs(a, b))
    for x, y in pairs:
        if not force and (what := _other_work(x, y)):
            raise BenchError(
                f"{x.name}: the reports measured different work ({what}); "
                "--force compares them all the same"
            )
    return [d for x, y in pairs for d in _differences(x, y, threshold)]


def verdict(a: Metric, b: Metric, threshold: float) -> Verdict:
    """The verdict on B: a difference beyond `threshold` (a share of A) and beyond the noise counts.

    The noise of a difference is that of both medians, added as independent errors are.
    """
    if a.noise is None or b.noise is None:
        return "too few samples"
    step = b.median - a.median
    if abs(step) <= max(threshold * abs(a.median), (a.noise**2 + b.noise**2) ** 0.5):
        return "within noise"
    return "better" if (step < 0) == (a.better == "lower") else "worse"


def _pairs(a: Report, b: Report) -> Iterator[tuple[Result, Result]]:
    """Configurations of the same name; two single ones belong together whatever their names."""
    if len(a.results) == len(b.results) == 1:
        yield a.results[0], b.results[0]
        return
    others = {result.name: result for result in b.results}
    shared = [(result, others[result.name]) for result in a.results if result.name in others]
    if not shared:
        names = (", ".join(result.name for result in report.results) for report in (a, b))
        raise BenchError(f"the reports share no configuration ({' against '.join(names)})")
    yield from shared


def _other_work(a: Result, b: Result) -> str:
    for name in ("image_sha256", "prompt", "generated", "long_context"):
        x, y = getattr(a.workload, name), getattr(b.workload, name)
        if x != y:
            return f"{name.replace('_', ' ')} {x!r} and {y!r}"
    return ""


def _differences(a: Result, b: Result, threshold: float) -> Iterator[Difference]:
    for name, x in a.metrics.items():
        if name in b.metrics and name not in _NOT_JUDGED:
            y = b.metrics[name]
            change = y.median / x.median - 1 if x.median else 0.0
            yield Difference(a.name, name, x, y, change, verdict(x, y, threshold))


def section(differences: list[Difference]) -> Section:
    """The comparison as a table."""
    several = len({d.configuration for d in differences}) > 1
    rows = tuple(
        (
            f"{d.configuration}: {QUANTITIES[d.metric].text}"
            if several
            else QUANTITIES[d.metric].text,
            amount(d.a.median, d.a.unit),
            amount(d.b.median, d.b.unit),
            f"{d.change:+.1%}",
            d.verdict,
        )
        for d in differences
    )
    head = ("quantity", "A", "B", "change", "verdict")
    return Section("Comparison", (), head, rows, tuple(range(len(head))))
