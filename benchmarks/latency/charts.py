"""Plots of a report."""

from __future__ import annotations

import numpy as np

from edgevlm.benchmarks.latency.report import STAGES, Beside, Physics, Report, Result
from edgevlm.benchmarks.latency.sections import amount
from edgevlm.benchmarks.latency.svg import Bar, Curve, bars, plot

_STAGE_NAMES = ("image decode", "preprocess", "vision", "projector", "prefill")
_RATES = (
    ("empty context", "decode_empty_tokens_per_s"),
    ("in an answer", "decode_tokens_per_s"),
    ("long context", "decode_long_tokens_per_s"),
)
_PEER_STAGES = (("encode", "encode_ms"), ("prefill", "prefill_ms"))
_MEMORY = (
    ("Python and libraries", "memory_base_bytes"),
    ("vision, projector, picture", "memory_vision_bytes"),
    ("decoder and context", "memory_decoder_bytes"),
)


def charts(report: Report) -> list[tuple[str, str, str]]:
    """(title, one line of explanation, SVG), without those that lack data."""
    results = report.results
    found = [
        (
            "Time to the first token",
            "A new picture, stage by stage; medians. The mark is the same picture asked again.",
            _first_token(results),
        ),
        (
            "Decode",
            "Tokens per second behind nothing, in an answer and behind a long context. A mark, "
            "where it is within four times the bars, is the memory's limit.",
            _decode(results),
        ),
        (
            "Between two tokens",
            "The share of tokens that came within a time: the steeper, the steadier.",
            _between(results),
        ),
        (
            "Memory",
            "Resident size after loading and the first answer, weights included. The mark is the "
            "peak.",
            _memory(results),
        ),
    ]
    found += [
        (
            f"{beside.configuration}: beside other projects",
            "Time to the first token on the same machine, in turns; medians.",
            _beside(beside),
        )
        for beside in report.peers
    ]
    if any(r.limits for r in results):
        found.append((
            "What is left: the roofline",
            "Operations per byte and per second of each stage. The lines are what this machine "
            "reached with numpy; the nearer a point is to its line, the less is left.",
            _roofline(report),
        ))  # fmt: skip
    return [chart for chart in found if chart[2]]


def _first_token(results: tuple[Result, ...]) -> str:
    rows = []
    for result in results:
        values = [(n, result.median(s)) for n, s in zip(_STAGE_NAMES, STAGES, strict=True)]
        total = result.median("first_token_warm_ms")
        if total is not None:
            stages = tuple((n, v) for n, v in values if v is not None)
            rest = max(total - sum(v for _, v in stages), 0.0)
            again = result.median("first_token_cached_ms")
            rows.append(Bar(result.name, (*stages, ("rest", rest)), amount(total, "ms"), again))
    return bars(rows, "ms") if rows else ""


def _decode(results: tuple[Result, ...]) -> str:
    rows = []
    for result in results:
        limit = 1e3 / result.limits["decode"].floor_ms if "decode" in result.limits else 0.0
        rates = {n: rate for n, metric in _RATES if (rate := result.median(metric))}
        # A limit far beyond what was reached would leave nothing of the bars.
        mark = limit if 0 < limit < 4 * max(rates.values(), default=0.0) else None
        for i, (name, rate) in enumerate(rates.items()):
            label = "" if i else result.name
            rows.append(Bar(label, ((name, rate),), amount(rate, "tok/s"), mark))
    return bars(rows, "tok/s") if rows else ""


def _between(results: tuple[Result, ...]) -> str:
    percents = np.arange(0, 101)
    curves = []
    for result in results:
        if metric := result.metrics.get("inter_token_ms"):
            at = np.percentile(metric.samples, percents)
            points = zip(at.tolist(), percents.tolist(), strict=True)
            curves.append(Curve(result.name, tuple(points)))
    return plot(curves, "milliseconds", "% of tokens") if curves else ""


def _memory(results: tuple[Result, ...]) -> str:
    rows = []
    for result in results:
        parts = [(text, result.median(name)) for text, name in _MEMORY]
        peak = result.median("peak_rss_bytes")
        if peak is not None:
            values = tuple((text, v / 2**20) for text, v in parts if v is not None)
            rows.append(Bar(result.name, values, amount(peak, "B"), peak / 2**20))
    return bars(rows, "MiB") if rows else ""


def _beside(beside: Beside) -> str:
    rows = []
    for peer in beside.results:
        if total := peer.metrics.get("first_token_ms"):
            parts = [(text, peer.metrics.get(name)) for text, name in _PEER_STAGES]
            stages = tuple((text, m.median) for text, m in parts if m)
            rest = max(total.median - sum(ms for _, ms in stages), 0.0)
            rows.append(Bar(peer.title, (*stages, ("rest", rest)), amount(total.median, "ms")))
    return bars(rows, "ms") if len(rows) > 1 else ""


def _roofline(report: Report) -> str:
    points = []
    for result in report.results:
        if result.limits:
            at = tuple(
                (limit.ops / limit.bytes, limit.ops / limit.measured_ms / 1e6)
                for limit in result.limits.values()
            )
            points.append(Curve(result.name, at, tuple(result.limits)))
    reach = [x for curve in points for x, _ in curve.points]
    roofs = [
        _roof(physics, ops_per_s, text, min(reach), max(reach))
        for physics in report.physics[-1:]
        for ops_per_s, text in (
            (physics.float32_ops_per_s, "float32"),
            (physics.int8_ops_per_s, f"8-bit ({physics.int8_instructions})"),
        )
    ]
    axes = ("operations per byte", "GFLOP/s")
    return plot([*points, *roofs], *axes, log_y=True, height=300)


def _roof(physics: Physics, ops_per_s: float, text: str, low: float, high: float) -> Curve:
    ridge = ops_per_s / physics.bytes_per_s
    xs = sorted({min(low, ridge / 10), ridge, max(high, ridge * 10)})
    points = tuple((x, min(x * physics.bytes_per_s, ops_per_s) / 1e9) for x in xs)
    return Curve(f"limit, {text}", points, dashed=True)
