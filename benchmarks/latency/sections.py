"""A report in words and tables, once; Markdown, page and terminal each show these sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgevlm.benchmarks.latency.report import (
    QUANTITIES,
    Beside,
    Limit,
    PeerResult,
    Report,
    Result,
)
from edgevlm.benchmarks.peers import METRICS as PEER_METRICS

Row = tuple[str, ...]

_SUMMARY = (
    ("first token", "first_token_warm_ms"),
    ("same picture", "first_token_cached_ms"),
    ("fresh process", "first_token_cold_ms"),
    ("load", "load_warm_ms"),
    ("decode", "decode_tokens_per_s"),
    ("peak memory", "peak_rss_bytes"),
)
# As older reports have it.
_REPACKING = {"True": "on", "False": "off"}
# Above this part of the cores, other programs are likely to be in the numbers.
_BUSY = 0.3


@dataclass(frozen=True)
class Section:
    """A title, some paragraphs, and a table where `head` is not empty. The first column is text,
    and those of `texts` are. `notes` stand below the table.

    `narrow` are the columns that fit into a terminal; one that has none is not shown there, of one
    that has some only the table and its notes.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    head: Row = ()
    rows: tuple[Row, ...] = ()
    narrow: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def amount(value: float, unit: str) -> str:
    """A number for people: three digits, bytes as MiB or GiB."""
    if unit == "B":
        value, unit = (value / 2**30, "GiB") if value >= 2**30 else (value / 2**20, "MiB")
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def count(n: int, thing: str) -> str:
    """A count with its noun: "1 thread", "2 threads"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def title(report: Report) -> str:
    """The headline of a report."""
    return f"edgevlm latency report{'' if report.complete else ' (partial)'}"


def warnings(report: Report) -> list[str]:
    """Warnings for readers before they trust a number."""
    found = list(report.notes)
    if made_up := [r.name for r in report.results if r.model.synthetic]:
        found.append(
            f"{', '.join(made_up)}: synthetic, random weights at the real size; times and memory "
            "are meant, answers are noise"
        )
    load, cores = report.machine.load_average, report.machine.usable_cores
    if load is not None and load > _BUSY * cores:
        found.append(
            f"the machine was busy before the start (load average {load:.1f} on {cores} cores): "
            "it can do better than this"
        )
    unsettled = [r.name for r in report.results if not r.settled]
    if unsettled:
        found.append(
            f"the spread of {', '.join(unsettled)} stayed above {report.target_spread:.0%} "
            "(1.57 IQR / \u221an of first token and decode): small differences mean nothing"
        )
    return found


def sections(report: Report) -> list[Section]:
    """Everything there is to say, the summary first."""
    return [
        summary(report),
        *map(peers_section, report.peers),
        *quality_sections(report),
        *(s for result in report.results for s in _details(report, result)),
        _machine(report),
    ]


def summary(report: Report) -> Section:
    """One row a configuration, medians."""
    rows = []
    for result in report.results:
        cells = (_median(result, name) for _, name in _SUMMARY)
        rows.append((result.name, *cells, amount(result.model.bytes, "B")))
    head = ("configuration", *(text for text, _ in _SUMMARY), "on disk")
    return Section("Summary", ("Medians.",), head, tuple(rows), (0, 1, 2, 5, 6))


def peers_section(beside: Beside) -> Section:
    """edgevlm and its peers: medians, and how many times as long as edgevlm each takes."""
    ours = beside.results[0]
    head = ("project", *PEER_METRICS.values(), "peak memory", "first token, x", "decode, x", "how")
    rows = tuple(_peer_row(peer, ours) for peer in beside.results)
    rounds = max(len(m.samples) for m in ours.metrics.values())
    about = (
        f"Medians of {count(rounds, 'turn')}, one project in a process, by turns; the same "
        f"picture, prompt ({ours.positions} positions) and {beside.generated} tokens, "
        f"{count(beside.threads, 'thread')}. The columns with x say how many times as long as "
        "edgevlm a project takes."
    )
    why = tuple(f"{peer.title}: {peer.error.rstrip('.')}." for peer in beside.results if peer.error)
    title = f"{beside.configuration}: beside other projects"
    return Section(title, (about,), head, rows, (0, 3, 4, 6, 7), (8,), why)


def _peer_row(peer: PeerResult, ours: PeerResult) -> Row:
    if peer.error:
        what = peer.state or ("no answer" if peer.installed else "not installed")
        return (peer.title, "-", "-", what, "-", "-", "-", "-", "see below")
    names = (*PEER_METRICS, "peak_rss_bytes")
    cells = (amount(m.median, m.unit) if (m := peer.metrics.get(n)) else "-" for n in names)
    times = (_times(peer, ours, name) for name in ("first_token_ms", "token_ms"))
    how = peer.how
    if peer.positions != ours.positions:
        how += f", {peer.positions} positions"
    return (f"{peer.title} {peer.version}", *cells, *times, how)


def _times(peer: PeerResult, ours: PeerResult, name: str) -> str:
    theirs, mine = peer.metrics.get(name), ours.metrics.get(name)
    return f"{theirs.median / mine.median:.2f}" if theirs and mine and mine.median else "-"


def quality_sections(report: Report) -> Iterator[Section]:
    """Sections on the cost of the precisions, where it was measured."""
    found = [(r.name, r.quality) for r in report.results if r.quality]
    if not found:
        return
    tasks = list(dict.fromkeys(task for _, q in found for task in q.accuracy))
    head = ("configuration", "vision", "projector", "KL, nats", "top-1", *tasks)
    rows = tuple(
        (
            name,
            f"{1 - q.features_cosine:.1e}",
            f"{1 - q.embeddings_cosine:.1e}",
            f"{q.logit_kl:.2g}",
            f"{q.top1_agreement:.1%}",
            *(f"{q.accuracy[task]:.1%}" if task in q.accuracy else "-" for task in tasks),
        )
        for name, q in found
    )
    about = (
        f"Beside {', '.join(dict.fromkeys(q.reference for _, q in found))}: 1 - cosine of the "
        "encoder's and the projector's rows, divergence of the next token's distribution, the "
        "share of positions with the same likeliest token"
        f"{', and right answers by task' if tasks else ''}."
    )
    yield Section("Quality", (about,), head, rows, (0, 1, 3, 4))


def _median(result: Result, name: str) -> str:
    metric = result.metrics.get(name)
    return amount(metric.median, metric.unit) if metric else "-"


def _details(report: Report, result: Result) -> Iterator[Section]:
    rows = []
    for name, metric in result.metrics.items():
        values = (metric.median, metric.min, metric.p90, metric.p99, metric.max, metric.std)
        cells = (amount(value, metric.unit) for value in values)
        rows.append((QUANTITIES[name].text, *cells, str(len(metric.samples))))
    missing = (f"{QUANTITIES[n].text}: {why}" for n, why in result.unavailable.items())
    unavailable = tuple(f"Not available: {text}." for text in missing)
    head = ("quantity", "median", "min", "p90", "p99", "max", "std", "samples")
    # Quantity, median, min, p90, samples.
    yield Section(result.name, (_asked(result), *unavailable), head, tuple(rows), (0, 1, 2, 3, 7))
    if result.limits:
        yield _limits(report, result)
    yield _components(result)


def _asked(result: Result) -> str:
    work, settings = result.workload, result.settings
    repack = str(settings.repack)
    width, height = work.image_size
    return (
        f'Asked "{work.prompt}" about {work.image} ({width} x {height}): {work.image_tokens} '
        f"tokens of the picture ({work.cached_tokens} of them known when it was asked again), "
        f"{work.text_tokens} of text, {work.generated} generated, greedy. "
        f"{count(result.rounds, 'whole round')}, each in a process of its own; "
        f"{count(settings.threads, 'thread')}, {_engines(result)}, weight repacking "
        f"{_REPACKING.get(repack, repack)}; long context: {work.long_context} tokens"
        f"{f'; energy: {settings.energy}' if settings.energy else ''}."
    )


def _engines(result: Result) -> str:
    settings = result.settings
    vision = " ".join(filter(None, (settings.vision_precision, "encoder on", settings.provider)))
    decoder = f"decoder on {settings.decoder}" if settings.decoder else ""
    cache = f"its cache in {settings.kv}" if settings.kv else ""
    return ", ".join(filter(None, (vision, decoder, cache)))


def _limits(report: Report, result: Result) -> Section:
    rows = tuple(_limit_row(name, limit) for name, limit in result.limits.items())
    peaks = next(p for p in report.physics if p.threads == result.settings.threads)
    return Section(
        f"{result.name}: how much of this machine is used",
        (
            f"Measured with numpy on {count(peaks.threads, 'thread')}: "
            f"{peaks.bytes_per_s / 1e9:.1f} GB/s, "
            f"{peaks.float32_ops_per_s / 1e9:.0f} GFLOP/s in float32; 8-bit weights could go "
            f"{peaks.int8_ratio:.3g} times as fast ({peaks.int8_instructions}). A stage that "
            "reaches 100 % is as fast as that; weights that fit into the caches can go beyond.",
        ),
        ("stage", "operations", "bytes", "limited by", "at best", "measured", "reached"),
        rows,
        (0, 3, 4, 5, 6),
    )


def _limit_row(name: str, limit: Limit) -> Row:
    arithmetic = limit.floor_ms <= 1.001e3 * limit.ops / limit.ops_per_s
    return (
        name,
        f"{limit.ops / 1e9:,.3g} G",
        amount(limit.bytes, "B"),
        "arithmetic" if arithmetic else "memory",
        amount(limit.floor_ms, "ms"),
        amount(limit.measured_ms, "ms"),
        f"{limit.percent:.0f} %",
    )


def _components(result: Result) -> Section:
    model = result.model
    rows = tuple(
        (part_name, part.precision, amount(part.bytes, "B"), file, sha256)
        for part_name, part in model.components.items()
        for file, sha256 in part.sha256.items()
    )
    about = f"{model.name} ({model.family}, {model.license}), {amount(model.bytes, 'B')}."
    head = ("component", "precision", "size", "file", "sha256")
    return Section(f"{result.name}: the bundle", (about,), head, rows, texts=(1, 3, 4))


def _machine(report: Report) -> Section:
    machine = report.machine
    shortest = report.shortest_stage()
    rows = [
        ("date", report.created),
        ("command", report.command),
        ("processor", machine.cpu),
        ("architecture", machine.architecture),
        ("cores", f"{machine.physical_cores} physical, {machine.usable_cores} usable"),
        ("memory", amount(machine.memory_bytes, "B")),
        ("system", machine.system),
        ("power", ", ".join(machine.power) or "not readable"),
        ("flags", " ".join(machine.flags) or "not readable"),
        *report.software.items(),
    ]
    if report.results:
        rows.append(("llama.cpp", " ".join(report.results[0].settings.llama_cpp)))
    if shortest:
        name, ms = shortest
        rows.append((
            "overhead of measuring",
            f"{report.overhead_ms * 1e3:.2f} \u00b5s a stage, {report.overhead_ms / ms:.2%} of the "
            f"shortest ({QUANTITIES[name].text})",
        ))  # fmt: skip
    return Section("Machine and software", (), ("", ""), tuple(rows))
