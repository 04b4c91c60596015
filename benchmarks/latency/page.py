"""A report as one HTML page that needs no network: tables, plots, light and dark."""

from __future__ import annotations

from html import escape

from edgevlm.benchmarks.latency.charts import charts
from edgevlm.benchmarks.latency.report import Report
from edgevlm.benchmarks.latency.sections import Row, Section, amount, sections, title, warnings

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #dfe3ea; --paper: #fff;
  --card: #f6f7f9; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --line: #323a48;
  --paper: #13161c; --card: #1b2029; --warn: #3a2f12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .3rem 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.warn { background: var(--warn); padding: .5rem .8rem; border-radius: .4rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem 1rem; flex: 1 1 9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; overflow-x: auto; }
svg { width: 100%; min-width: 34rem; height: auto; margin-top: .6rem;
  font: 13px system-ui, sans-serif; }
text { fill: var(--ink); } text.small { fill: var(--soft); font-size: 11.5px; }
.tick { stroke: var(--line); } .mark { stroke: var(--ink); stroke-width: 2; }
.line { fill: none !important; stroke-width: 2; }
.table { overflow-x: auto; margin-top: .5rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: .22rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; }
td.text, th.text { text-align: left; } td.text { white-space: normal; }
td.text:last-child { overflow-wrap: anywhere; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { color: var(--soft); white-space: nowrap; vertical-align: top; }
"""
_COLOURS = (
    "#4269d0", "#e8a70c", "#ff725c", "#38b29a", "#3ca951", "#a463f2", "#ff8ab7", "#9c6b4e",
)  # fmt: skip
_CARDS = (
    ("first token, new picture", "first_token_warm_ms"),
    ("same picture again", "first_token_cached_ms"),
    ("decode", "decode_tokens_per_s"),
    ("peak memory", "peak_rss_bytes"),
)


def to_html(report: Report) -> str:
    """The whole report as one page."""
    colours = "".join(f".s{i} {{ fill: {c}; stroke: {c}; }}" for i, c in enumerate(_COLOURS))
    summary, *rest = sections(report)
    plots = "".join(
        f"<h2>{escape(name)}</h2><figure><figcaption>{escape(about)}</figcaption>{svg}</figure>"
        for name, about, svg in charts(report)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title(report))}</title><style>{_STYLE}rect, circle {{ stroke: none "
        f"!important; }}{colours}</style></head><body>{_head(report)}{_section(summary)}{plots}"
        f"{''.join(map(_section, rest))}</body></html>\n"
    )


def _head(report: Report) -> str:
    machine = report.machine
    about = f"{machine.cpu}, {machine.usable_cores} cores, {machine.system}; {report.created}"
    warned = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings(report))
    cards = _cards(report) if len(report.results) == 1 else ""
    return f'<h1>{escape(title(report))}</h1><p class="soft">{escape(about)}</p>{warned}{cards}'


def _cards(report: Report) -> str:
    found = [(text, report.results[0].metrics.get(name)) for text, name in _CARDS]
    cards = "".join(
        f'<div class="card"><b>{escape(amount(m.median, m.unit))}</b>'
        f'<span class="soft">{escape(text)}</span></div>'
        for text, m in found
        if m
    )
    return f'<div class="cards">{cards}</div>'


def _section(section: Section) -> str:
    about, notes = (
        "".join(f'<p class="soft">{escape(p)}</p>' for p in part)
        for part in (section.paragraphs, section.notes)
    )
    return f"<h2>{escape(section.title)}</h2>{about}{_table(section)}{notes}"


def _table(section: Section) -> str:
    if not section.head:
        return ""
    facts = not any(section.head)
    head = "" if facts else f"<tr>{_cells('th', section.head, section.texts)}</tr>"
    rows = "".join(f"<tr>{_cells('td', row, section.texts)}</tr>" for row in section.rows)
    css = ' class="facts"' if facts else ""
    return f'<div class="table"><table{css}>{head}{rows}</table></div>'


def _cells(tag: str, cells: Row, texts: tuple[int, ...]) -> str:
    css = [' class="text"' if i in texts else "" for i in range(len(cells))]
    return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(css, cells, strict=True))
