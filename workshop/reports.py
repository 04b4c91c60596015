"""The reports in docs/benchmarks, and the page that shows their tables.

    python -m workshop.reports docs/benchmarks [NAME...] [--peer-python PEER=PYTHON]

Each is a run of `edgevlm bench`, whose command line it states; without names all are made again,
which takes half an hour on two cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from edgevlm.benchmarks.latency.report import Report, read_report
from edgevlm.benchmarks.latency.sections import (
    Section,
    count,
    peers_section,
    quality_sections,
    summary,
)
from edgevlm.benchmarks.latency.tables import section_markdown
from edgevlm.export import child
from workshop import published

_PICO = Path(__file__).parent / "pico" / "checkpoint"
# pico at further precisions, beside the built-in one: name -> decoder, encoder.
_PICOS = {"pico-f32": ("f32", "fp32"), "pico-f16": ("f16", "fp16"), "pico-q4_0": ("q4_0", "int8")}
# Of the same shapes, for peers that convert one themselves.
_CHECKPOINT = "checkpoint"
# Name -> arguments of `edgevlm bench`; two rounds where one takes minutes.
REPORTS: Mapping[str, tuple[str, ...]] = {
    "pico": ("pico", *_PICOS, "--runs", "3", "--quality", "pico-f32"),
    "paligemma-3b-224": (
        *("--synthetic", "paligemma-3b-224", "--runs", "2"),
        *("--peers", "--peer-rounds", "1"),
    ),
    "paligemma2-3b-224": ("--synthetic", "paligemma2-3b-224", "--runs", "2"),
    "mobilepalo-1.7b": (
        *("--synthetic", "mobilepalo-1.7b", "--runs", "2"),
        *("--peers", "--peer-rounds", "1"),
    ),
    "tinygptv-stage4": ("--synthetic", "tinygptv-stage4", "--runs", "2"),
    "tiny-llava-v1": (
        *("--synthetic", "tiny-llava-v1", "--runs", "2"),
        *("--peers", "--peer-rounds", "1", "--checkpoint", _CHECKPOINT),
    ),
}
_KEPT = ("report.json", "report.md", "report.html")
_HEAD = """\
# Measured reports

Made by `python -m workshop.reports docs/benchmarks`. Every folder here is one run of
`edgevlm bench`: `report.html` is a page with plots to download and open, `report.json` has every
sample and can be compared with a report of your own machine (`edgevlm bench compare --force`).

Names that begin with `synthetic-` are models of the published shapes with random weights: times and
memory are meant, answers are noise. How everything is measured, and what each number means, stands
in [Latency reports](../benchmarks.md).
"""


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(REPORTS)))
@click.option("--peer-python", "pythons", multiple=True, metavar="PEER=PYTHON")
@click.option("--page-only", is_flag=True, help="Measure nothing; write README.md again.")
def main(folder: Path, names: tuple[str, ...], pythons: tuple[str, ...], page_only: bool) -> None:
    """Makes the reports NAMES (all without any) in FOLDER, then FOLDER/README.md."""
    for name in () if page_only else names or REPORTS:
        own = [f"--peer-python={text}" for text in pythons if "--peers" in REPORTS[name]]
        with tempfile.TemporaryDirectory() as work:
            _make(name, own, Path(work), folder / name)
    (folder / "README.md").write_text(page(folder), encoding="utf-8")


def _make(name: str, more: list[str], work: Path, folder: Path) -> None:
    """Runs bench in `work`, so that its command line holds no path of this machine."""
    if name == "pico":
        _export_picos(work)
    if _CHECKPOINT in REPORTS[name]:
        published.write(name, work / _CHECKPOINT)
    arguments = ["bench", *REPORTS[name], *more, "--out", "report"]
    start = child.command("edgevlm", *arguments)
    done = subprocess.run(start, check=False, env=child.environment(), cwd=work)
    if done.returncode:
        raise click.ClickException(f"edgevlm bench of {name} ended with {done.returncode}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in _KEPT:
        shutil.copyfile(work / "report" / file, folder / file)


def _export_picos(work: Path) -> None:
    from edgevlm.export import export_bundle

    for name, (quant, vision) in _PICOS.items():
        export_bundle(
            _PICO,
            work / name,
            quant=quant,
            vision_precision=vision,
            verify=False,
            name="pico",
        )


def page(folder: Path) -> str:
    """README.md: the tables of all reports that are there."""
    found = {
        name: read_report(path)
        for name in REPORTS
        if (path := folder / name / "report.json").is_file()
    }
    sections = (section_markdown(s) for s in _sections(found))
    return "\n\n".join([_HEAD.strip(), *sections]) + "\n"


def _sections(reports: Mapping[str, Report]) -> Iterator[Section]:
    machines = dict.fromkeys(
        f"{r.machine.cpu} ({_instructions(r)}), {count(r.machine.usable_cores, 'core')}, "
        f"{r.machine.memory_bytes / 2**30:.0f} GiB"
        for r in reports.values()
    )
    rows = [
        (*row, f"[{name}]({name}/report.md)")
        for name, report in reports.items()
        for row in summary(report).rows
    ]
    if rows:
        head = (*summary(next(iter(reports.values()))).head, "report")
        yield Section("Summary", (f"Medians, on {'; '.join(machines)}.",), head, tuple(rows))
    for report in reports.values():
        yield from map(peers_section, report.peers)
        yield from quality_sections(report)


def _instructions(report: Report) -> str:
    """The processor's instructions for 8-bit products, which quantized models live on."""
    return next((p.int8_instructions for p in report.physics), "instructions not known")


if __name__ == "__main__":
    main()
