"""Plots as SVG text that a page can hold: no library, no script, colours from the page's style.

Classes `s0` to `s7` are the colours of series, `axis`, `tick` and `mark` lines, `small` small text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
_RIGHT = 90
_BAR, _GAP = 22, 12
_LETTER = 7.2
_LONGEST = 34
_COLOURS = 8
# Curves whose points have their labels beside them.
_LABELLED = 2
# A logarithmic axis shows zero here.
_LEAST = 1e-6
# An axis of more decades than this has ticks at powers of ten alone.
_MANY_DECADES = 3


@dataclass(frozen=True)
class Bar:
    """One row: its label, values by series in order, the text behind it, where a mark stands."""

    label: str
    values: tuple[tuple[str, float], ...]
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line through points (x, y), or single points with labels where `labels` are given."""

    name: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...] = ()
    dashed: bool = False


def colour(i: int) -> str:
    """The class of the i-th series."""
    return f"s{i % _COLOURS}"


def bars(rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars, stacked where a row has several values; a legend where there are several
    series.
    """
    series = list(dict.fromkeys(name for row in rows for name, _ in row.values))
    top = max(max(sum(v for _, v in row.values), row.mark or 0) for row in rows) or 1.0
    left = 16 + _LETTER * min(max(len(row.label) for row in rows), _LONGEST)
    scale = (WIDTH - left - _RIGHT) / top
    parts, y = _legend(series, left) if len(series) > 1 else ([], 0)
    y += 8
    first = y
    for row in rows:
        parts += _bar(row, series, left, y, scale)
        y += _BAR + _GAP
    ticks = [
        _line(left + t * scale, first - 4, left + t * scale, y, "tick")
        + _text(left + t * scale, y + 14, f"{t:g}", "middle", "small")
        for t in _ticks(top)
    ]
    unit_text = _text(WIDTH, y + 14, unit, "end", "small")
    return _svg(y + 22, [*ticks, *parts, unit_text])


def _bar(row: Bar, series: list[str], left: float, y: float, scale: float) -> list[str]:
    x = left
    label = row.label if len(row.label) <= _LONGEST else row.label[: _LONGEST - 1] + "\u2026"
    parts = [_text(left - 8, y + 15, label, "end")]
    for name, value in row.values:
        width = value * scale
        tip = f"<title>{escape(f'{name}: {value:.4g}')}</title>"
        parts.append(
            f'<rect class="{colour(series.index(name))}" x="{x:.1f}" y="{y}" '
            f'width="{width:.1f}" height="{_BAR}">{tip}</rect>'
        )
        x += width
    if row.mark is not None:
        at = left + row.mark * scale
        parts.append(_line(at, y - 3, at, y + _BAR + 3, "mark"))
        x = max(x, at)
    return [*parts, _text(x + 6, y + 15, row.text)]


def plot(
    curves: Sequence[Curve], x_title: str, y_title: str, *, log_y: bool = False, height: int = 240
) -> str:
    """Lines and labelled points over a logarithmic x axis and a y axis that may be one."""
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    parts, top = _legend([c.name for c in curves], 60)
    top += 24
    bottom = top + height
    across = _Axis(xs, 60, WIDTH - 24, log=True)
    up = _Axis(ys, bottom, top, log=log_y)
    for x in across.ticks:
        at = across(x)
        parts.append(_line(at, top, at, bottom, "tick"))
        parts.append(_text(at, bottom + 16, _short(x), "middle", "small"))
    for y in up.ticks:
        parts.append(_line(60, up(y), WIDTH - 24, up(y), "tick"))
        parts.append(_text(54, up(y) + 4, _short(y), "end", "small"))
    for i, curve in enumerate(curves):
        parts += _curve(curve, i, [(across(x), up(y)) for x, y in curve.points])
    parts.append(_text(WIDTH - 24, bottom + 34, x_title, "end", "small"))
    parts.append(_text(60, top - 7, y_title, "start", "small"))
    return _svg(bottom + 42, parts)


def _curve(curve: Curve, i: int, points: list[tuple[float, float]]) -> list[str]:
    css = colour(i)
    if curve.labels:
        # Two configurations often lie close: their labels stand on either side.
        shift, anchor = ((9, "start"), (-9, "end"))[i % 2]
        # Of more, those of all but the first would hide one another; they show under the pointer.
        return [
            f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(f'{curve.name}: {label}')}</title></circle>"
            + (_text(x + shift, y + 4, label, anchor, "small") if i < _LABELLED else "")
            for (x, y), label in zip(points, curve.labels, strict=True)
        ]
    dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [f'<polyline class="{css} line" points="{path}"{dash}/>']


class _Axis:
    """Maps values to pixels from `start` to `end`; linear axes begin at 0, log ones at 1, 2 or 5
    times a power of ten.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._log = log
        if log:
            self.ticks = _log_ticks(max(min(values), _LEAST), max(*values, _LEAST))
            low, high = math.log10(self.ticks[0]), math.log10(self.ticks[-1])
        else:
            low, high = 0.0, max(values) or 1.0
            self.ticks = _ticks(high)
        self._low, self._scale = low, (end - start) / (high - low)
        self._start = start

    def __call__(self, value: float) -> float:
        at = math.log10(max(value, _LEAST)) if self._log else value
        return self._start + (at - self._low) * self._scale


def _ticks(top: float) -> list[float]:
    """About five round numbers from 0 up to `top`."""
    step = 10.0 ** math.floor(math.log10(top / 4))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if top / (step * f) <= 5)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten around `low` and `high`; where they are few, 2 and 5 times them as well."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > _MANY_DECADES:
        return [10.0**e for e in range(first, last + 1)]
    steps = [f * 10.0**e for e in range(first, last + 2) for f in (1, 2, 5)]
    start = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    end = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[start : max(end, start + 1) + 1]


def _short(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e5 or value == 0 else f"{value:.0e}"


def _legend(names: Sequence[str], left: float) -> tuple[list[str], float]:
    """The legend, in as many lines as it needs, and its height."""
    parts, x, y = [], left, 3
    for i, name in enumerate(names):
        width = 30 + 6.4 * len(name)
        if x + width > WIDTH and x > left:
            x, y = left, y + 18
        parts.append(f'<rect class="{colour(i)}" x="{x:.0f}" y="{y}" width="11" height="11"/>')
        parts.append(_text(x + 16, y + 10, name, "start", "small"))
        x += width
    return parts, y + 18


def _line(x0: float, y0: float, x1: float, y1: float, css: str) -> str:
    return f'<line class="{css}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "label") -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{body}</svg>'
