"""The reports in docs/benchmarks, and the page that shows their tables.

    python -m workshop.reports docs/benchmarks [NAME...] [--checkpoints FOLDER]
        [--peer-environment PEER=FOLDER]...

Each is a run of `edgevlm bench`, whose command line it states; without names all are made again,
which takes an hour and a half on two cores. Nothing else should run meanwhile. Peers that read no
bundle get a checkpoint of the same shapes, 24 GB of disk for all, which `--checkpoints` keeps for
the next run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
# Names of bench's models -> names of checkpoints of the same shapes.
_BESIDE_PEERS = {
    "paligemma-3b-224": "paligemma-3b-224",
    "mobilepalo-1.7b": "mobilepalo-1.7b",
    "smolvlm-256m": "smolvlm-256m",
    "tiny-llava-v1": "tiny-llava-v1",
    "tinygptv-stage4": "tinygptv",
}
# Turns of ours and of every peer.
_TURNS = "3"
NAMES = ("pico", *_BESIDE_PEERS)
_KEPT = ("report.json", "report.md", "report.html")
_HEAD = """\
# Measured reports

Made by `python -m workshop.reports {folder}`. Every folder here is one run of
`edgevlm bench`: `report.html` is a page with plots to download and open, `report.json` has every
sample and can be compared with a report of your own machine (`edgevlm bench compare --force`).

Names that begin with `synthetic-` are models of the published shapes with random weights: times and
memory are meant, answers are noise. How everything is measured, and what each number means, stands
in [Latency reports]({said}).
"""
_SAID = Path(__file__).parent.parent / "docs" / "benchmarks.md"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--checkpoints", type=click.Path(file_okay=False, path_type=Path))
@click.option("--peer-environment", "environments", multiple=True, metavar="PEER=FOLDER")
@click.option("--page-only", is_flag=True, help="Measure nothing; write README.md again.")
def main(
    folder: Path,
    names: tuple[str, ...],
    checkpoints: Path | None,
    environments: tuple[str, ...],
    page_only: bool,
) -> None:
    """Makes the reports NAMES (all without any) in FOLDER, then FOLDER/README.md."""
    for name in () if page_only else names or NAMES:
        with tempfile.TemporaryDirectory() as work:
            arguments = _arguments(name, Path(work), checkpoints or Path(work))
            if name in _BESIDE_PEERS:
                arguments += _pythons(environments, Path(work))
            _make(name, arguments, Path(work), folder / name)
    (folder / "README.md").write_text(page(folder), encoding="utf-8")


def _arguments(name: str, work: Path, checkpoints: Path) -> list[str]:
    """Those of bench, run in `work`; the files that they name are there then."""
    if name == "pico":
        _export_picos(work)
        return ["pico", *_PICOS, "--runs", _TURNS, "--quality", "pico-f32"]
    origin = checkpoints / _BESIDE_PEERS[name]
    beside = published.write(origin.name, origin)
    _link(work / "checkpoint", origin)
    if beside:
        _link(work / "tower", Path(beside[-1]))
    return [
        *("--synthetic", name, "--runs", _TURNS, "--peers", "--peer-rounds", _TURNS),
        *("--checkpoint", "checkpoint"),
        *(("--vision-tower", "tower") if beside else ()),
    ]


def _pythons(environments: Sequence[str], work: Path) -> list[str]:
    """Options of bench for peers that have an environment to themselves."""
    pairs = dict(text.partition("=")[::2] for text in environments)
    for peer, environment in pairs.items():
        _link(work / peer, Path(environment))
    return [f"--peer-python={peer}={peer}/bin/python" for peer in pairs]


def _link(link: Path, target: Path) -> None:
    """The command line of a report names the link, and no path of this machine."""
    link.symlink_to(target.absolute())


def _make(name: str, arguments: list[str], work: Path, folder: Path) -> None:
    start = child.command("edgevlm", "bench", *arguments, "--out", "report")
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
        for name in NAMES
        if (path := folder / name / "report.json").is_file()
    }
    sections = (section_markdown(s) for s in _sections(found))
    said = os.path.relpath(_SAID, folder.absolute())
    return "\n\n".join([_HEAD.format(folder=folder, said=said).strip(), *sections]) + "\n"


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
