"""`python -m workshop.precisions`: every precision of pico, in one table.

pico is the model to measure on: its float weights are in the repository, and it answers questions
whose answers are known. Each part is varied alone, the other stays in float32; speed and memory are
measured one bundle after the other, quality with a process for each core.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from edgevlm.benchmarks.latency.files import default_picture
from edgevlm.benchmarks.latency.gather import Configuration
from edgevlm.benchmarks.latency.report import Report, Result
from edgevlm.benchmarks.latency.runner import BenchPlan, run_plan
from edgevlm.benchmarks.latency.sections import Section
from edgevlm.benchmarks.latency.tables import section_markdown
from edgevlm.benchmarks.quality import MeasuredQuality, compare, observe
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import ExportError
from edgevlm.export import (
    QUANTS,
    VISION_PRECISIONS,
    export_bundle,
    precisions,
    requantize,
    requantize_bundle,
)
from edgevlm.export.gguf import importance
from edgevlm.export.gguf.tools import Matrix
from edgevlm.machine import usable_cpus
from edgevlm.manifest import write_manifest
from edgevlm.models import BUILT_IN

_HERE = Path(__file__).parent
CHECKPOINT = _HERE / "pico" / "checkpoint"
# Between these lines of the page stands what this command measured.
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Also made with an importance matrix, which they do not need.
_WEIGHED = ("q4_0", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
_TOKENS = 24
_QUALITY = ("KL, nats", "top-1", "accuracy", "change")


@dataclass(frozen=True)
class Row:
    """One bundle to measure: the part that it varies, the name of its row, and the cache's type."""

    part: str
    name: str
    bundle: Bundle
    kv: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the varied part, in bytes."""
        return sum(f.bytes for f in self.bundle.manifest.components[self.part].files)


@dataclass(frozen=True)
class Measured:
    """A row with its quality, and its speed where that was measured."""

    row: Row
    quality: MeasuredQuality
    speed: Result | None


def rows(work: Path, checkpoint: Path = CHECKPOINT) -> Iterator[Row]:
    """Makes the bundles in `work`, the reference first."""
    whole = export_bundle(
        checkpoint,
        work / "whole",
        quant="f32",
        vision_precision="fp32",
        name=BUILT_IN,
        verify=False,
    )
    yield Row("decoder", "f32", whole)
    for precision in VISION_PRECISIONS:
        bundle = whole
        if precision != "fp32":
            bundle = requantize_bundle(
                whole.folder, work / precision, vision_precision=precision, verify=False
            )
        yield Row("vision", precision, bundle)
    matrix = importance.collect(whole.folder, whole.manifest, None)
    for name in QUANTS[1:]:
        needed = matrix if precisions.quant(name).imatrix else None
        yield Row("decoder", name, _decoder_at(whole, work / name, name, needed))
        if name in _WEIGHED:
            with_matrix = _decoder_at(whole, work / f"{name}-imatrix", name, matrix)
            yield Row("decoder", f"{name} + imatrix", with_matrix)
    yield Row("decoder", "f16, cache q8_0", open_bundle(work / "f16"), kv="q8_0")


def _decoder_at(whole: Bundle, folder: Path, name: str, matrix: Matrix | None) -> Bundle:
    """`requantize_bundle` with a matrix that is there already."""
    folder.mkdir()
    for part in ("vision", "projector"):
        for entry in whole.manifest.components[part].files:
            shutil.copyfile(whole.folder / entry.file, folder / entry.file)
    manifest = requantize.decoder_at(whole, folder, precisions.quant(name), matrix, None)
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


def qualities(made: Sequence[Row], work: Path, scenes: int) -> list[MeasuredQuality]:
    """Every row against the first, as many at a time as there are cores."""
    reference = observe(made[0].bundle.folder, work / "reference.npz", scenes, threads=1)

    def one(i: int) -> MeasuredQuality:
        row, target = made[i], work / f"{i}.npz"
        seen = observe(row.bundle.folder, target, scenes, follow=reference, threads=1, kv=row.kv)
        return compare(seen, reference)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(one, range(len(made))))


def speeds(made: Sequence[Row], work: Path, runs: int) -> Report:
    """Stages and memory of every row, in turn; rows with a cache of another type are left out."""
    picture = default_picture(work)
    plan = BenchPlan(
        tuple(Configuration(f"{r.part} {r.name}", r.bundle, picture) for r in made if not r.kv),
        tokens=_TOKENS,
        runs=runs,
        pairs=3,
    )
    return run_plan(plan, "python -m workshop.precisions")


def page(found: Sequence[Measured], report: Report, scenes: int) -> str:
    """Both tables as Markdown, with the machine they were made on."""
    reference = found[0].quality.accuracy["all"]
    vision = [m for m in found if m.row.part == "vision"]
    decoder = [m for m in found if m.row.part == "decoder"]
    n = f"{2 * scenes} drawn scenes, {found[0].quality.positions} next-token distributions"
    machine = report.machine
    about = (
        f"{n}; {machine.cpu}, {machine.usable_cores} cores, {machine.system}; "
        f"pico answers {100 * reference:.1f} % in float32."
    )
    vision_title, decoder_title = (
        "Vision encoder, decoder in f32",
        "Decoder, vision encoder in fp32",
    )
    tables = (_vision(vision, vision_title, reference), _decoder(decoder, decoder_title, reference))
    return "\n\n".join([about, *map(section_markdown, tables)])


def _vision(found: Sequence[Measured], title: str, reference: float) -> Section:
    head = ("precision", "size", "vision", "peak memory", "features", "embeddings", *_QUALITY)
    lines = [
        (
            *_begin(m),
            _number(m.speed, "vision_ms", "ms"),
            _number(m.speed, "peak_rss_bytes", "MB", 1e-6),
            f"{m.quality.features_cosine:.5f}",
            f"{m.quality.embeddings_cosine:.5f}",
            *_end(m.quality, reference),
        )
        for m in found
    ]
    return Section(title, (), head, tuple(lines))


def _decoder(found: Sequence[Measured], title: str, reference: float) -> Section:
    head = ("precision", "size", "prefill, tok/s", "decode, tok/s", "peak memory", *_QUALITY)
    lines = [
        (
            *_begin(m),
            _number(m.speed, "prefill_tokens_per_s", ""),
            _number(m.speed, "decode_tokens_per_s", ""),
            _number(m.speed, "peak_rss_bytes", "MB", 1e-6),
            *_end(m.quality, reference),
        )
        for m in found
    ]
    return Section(title, (), head, tuple(lines))


def _begin(m: Measured) -> tuple[str, str]:
    return m.row.name, f"{m.row.bytes / 1e6:.2f} MB"


def _end(q: MeasuredQuality, reference: float) -> tuple[str, str, str, str]:
    right = q.accuracy["all"]
    return (
        f"{q.logit_kl:.2g}",
        f"{100 * q.top1_agreement:.1f} %",
        f"{100 * right:.1f} %",
        f"{100 * (right - reference):+.1f}",
    )


def _number(speed: Result | None, metric: str, unit: str, scale: float = 1.0) -> str:
    median = speed.median(metric) if speed else None
    return f"{median * scale:.4g} {unit}".strip() if median is not None else ""


def write(page_file: Path, text: str) -> None:
    """Puts the tables between the marks of a page, or into a new one. Raises ExportError."""
    measured = f"{_BEGIN}\n{text}\n{_END}"
    if not page_file.exists():
        page_file.write_text(measured + "\n", encoding="utf-8")
        return
    old = page_file.read_text(encoding="utf-8")
    marks = re.compile(re.escape(_BEGIN) + ".*" + re.escape(_END), re.DOTALL)
    if not marks.search(old):
        raise ExportError(f"{page_file}: has no lines {_BEGIN!r} and {_END!r}; add them")
    page_file.write_text(marks.sub(lambda _: measured, old), encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page to write.")
@click.option(
    "--scenes", default=20, show_default=True, help="Scenes of each of two drawing routines."
)
@click.option("--runs", default=1, show_default=True, help="Processes that time each bundle.")
def main(out: Path, scenes: int, runs: int) -> None:
    """Measure every precision of pico and write the tables of docs/precisions.md."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        say: Callable[[str], None] = partial(click.echo, err=True)
        made = []
        for row in rows(work):
            say(f"{row.part} {row.name}")
            made.append(row)
        say(f"quality of {len(made)} bundles")
        quality = qualities(made, work, scenes)
        say("speed")
        report = speeds(made, work, runs)
        by_name = {result.name: result for result in report.results}
        found = [
            Measured(row, q, None if row.kv else by_name.get(f"{row.part} {row.name}"))
            for row, q in zip(made, quality, strict=True)
        ]
        write(out, page(found, report, scenes))
    say(f"{out}: written")


if __name__ == "__main__":
    main()
