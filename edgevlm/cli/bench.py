"""edgevlm bench: run (what `edgevlm bench` alone means), compare"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cleanup import temporary_folder
from edgevlm.cli.signals import raising

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from edgevlm.benchmarks.latency.extras import Extras
    from edgevlm.benchmarks.latency.report import Report
    from edgevlm.benchmarks.latency.sections import Section
    from edgevlm.bundle import Bundle
    from edgevlm.types import Progress

_WORSE, _INTERRUPTED = 3, 130


class _RunByDefault(click.Group):
    """`bench` without a subcommand is `bench run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def bench() -> None:
    """Measure how fast models run here; compare two reports.

    `edgevlm bench [MODEL]...` is short for `edgevlm bench run [MODEL]...`.
    """


@bench.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--synthetic",
    "made_up",
    multiple=True,
    metavar="NAME",
    help="A model of random weights at the real size, such as paligemma-3b-224: its speed here "
    "before any download; repeatable.",
)
@click.option(
    "--quant",
    "quants",
    multiple=True,
    default=("q4_k_m",),
    show_default=True,
    metavar="Q",
    help="Precision of synthetic models' decoders; repeatable.",
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    type=click.Path(path_type=Path),
    help="Picture file; several are measured one by one  [default: a drawn scene]",
)
@click.option("--prompt", metavar="TEXT", help="[default: the model's own for a caption]")
@click.option(
    "--tokens", type=click.IntRange(2), metavar="N", help="Tokens of every answer  [default: 32]"
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    metavar="N",
    help="Processes for each configuration  [default: until the numbers hold still]",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar="DEVICE",
    help="auto, cpu, gpu, npu or one that `edgevlm doctor` lists; repeatable.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Threads of both engines; repeatable  [default: cores]",
)
@click.option(
    "-o",
    "--output",
    "--out",
    "out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write report.json, .csv, .md and .html.",
)
@click.option("--quick", is_flag=True, help="One short round: an impression, not a report.")
@click.option(
    "--peers",
    is_flag=True,
    help="Ask other projects the same: transformers, llama.cpp, OpenVINO and more, if installed.",
)
@click.option(
    "--peer-rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Turns of every peer.",
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Checkpoint that MODEL was exported from, for peers that read no bundle.",
)
@click.option(
    "--vision-tower",
    "tower",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="The tower that the checkpoint leaves out.",
)
@click.option(
    "--peer-python",
    "pythons",
    multiple=True,
    metavar="PEER=PYTHON",
    help="A peer's own environment, such as openvino=venv/bin/python; repeatable.",
)
@click.option(
    "--quality",
    "reference",
    metavar="BUNDLE",
    help="Beside speed: how far the answers are from this bundle's, such as an f32 export.",
)
def run(models: tuple[str, ...], made_up: tuple[str, ...], quants: tuple[str, ...],
        images: tuple[Path, ...], prompt: str | None, tokens: int | None, runs: int | None,
        devices: tuple[str, ...], threads: tuple[int, ...], out: Path | None, quick: bool,
        peers: bool, peer_rounds: int, checkpoint: Path | None, tower: Path | None,
        pythons: tuple[str, ...], reference: str | None) -> None:  # fmt: skip
    """Measure MODELs: bundle folders or installed names, pico if none is named.

    Every stage from the picture file to the last token, cold, warm and with a known picture;
    memory, energy where it can be read, and how much of this machine's limits is used. Several
    configurations take turns, each round in a process of its own. Ctrl-C ends with what there is.
    Of a CLIP or SigLIP: pictures and texts a second.
    """
    if len(models) == 1 and not made_up and _is_dual(models[0]):
        given = {
            "--image": images,
            "--prompt": prompt,
            "--tokens": tokens,
            "--out": out,
            "--vision-tower": tower,
            "--peer-python": pythons,
            "--quality": reference,
        }
        if useless := [option for option, value in given.items() if value]:
            raise click.UsageError(f"{models[0]} embeds and answers nothing: no {useless[0]}")
        _bench_dual(models[0], runs or (1 if quick else 3), devices, threads, checkpoint, peers)
        return
    from rich.console import Console

    from edgevlm.benchmarks.latency import files
    from edgevlm.benchmarks.latency.extras import with_extras
    from edgevlm.benchmarks.latency.gather import configurations
    from edgevlm.benchmarks.latency.runner import BenchPlan, run_plan
    from edgevlm.image import read_image

    for image in images:
        read_image(image)
    extras = _extras(peers, checkpoint, tower, pythons, reference)
    extras = replace(extras, peer_rounds=peer_rounds)
    if out:
        files.make_folder(out)
    console = Console(stderr=True, markup=False, highlight=False)
    with temporary_folder() as folder, console.status("measuring") as status:
        making = "making {}, once".format
        bundles = _bundles(models, made_up, quants, lambda name: status.update(making(name)))

        def show(progress: Progress) -> None:
            status.update(f"{progress.stage}: round {progress.done + 1} of {progress.total}")

        pictures = images or (files.default_picture(folder),)
        plan = BenchPlan(configurations(bundles, pictures, devices, threads or (None,)), prompt)
        plan = replace(plan, runs=1, pairs=5, tokens=16) if quick else plan
        plan = replace(plan, runs=runs or plan.runs, tokens=tokens or plan.tokens)
        with raising():
            report = run_plan(plan, shlex.join(["edgevlm", *sys.argv[1:]]), show)
            if report.complete:
                report = with_extras(report, plan, extras, status.update)
    # Before anything is shown: that may fail, and what was measured is kept.
    written = files.write_files(report, out) if out else []
    _show(report, console)
    for path in written:
        console.print(path)
    if not report.complete:
        interrupted = any("interrupted" in note for note in report.notes)
        click.get_current_context().exit(_INTERRUPTED if interrupted else 1)


def _is_dual(model: str) -> bool:
    from edgevlm.models import is_dual, resolve

    return is_dual(resolve(model))


def _bench_dual(
    model: str,
    rounds: int,
    devices: tuple[str, ...],
    threads: tuple[int, ...],
    checkpoint: Path | None,
    peers: bool,
) -> None:
    """Pictures and texts a second, by batch; engines take turns."""
    from rich.console import Console

    from edgevlm.benchmarks import dual
    from edgevlm.models import resolve

    if checkpoint and not peers:
        raise click.UsageError("--checkpoint belongs to --peers")
    if len(devices) > 1 or len(threads) > 1:
        raise click.UsageError("of a model that embeds one device and one number of threads a run")
    console = Console(stderr=True, markup=False, highlight=False)
    with console.status("measuring") as status, raising():
        found = dual.compare(
            resolve(model),
            checkpoint=checkpoint,
            peers=peers,
            rounds=rounds,
            device=devices[0],
            threads=threads[0] if threads else None,
            progress=status.update,
        )
    _print(dual.section(found))
    if found[0].failed:
        click.get_current_context().exit(1)


def _extras(
    peers: bool,
    checkpoint: Path | None,
    tower: Path | None,
    pythons: tuple[str, ...],
    reference: str | None,
) -> Extras:
    """Extra measurements; an unknown bundle, peer or Python is refused before anything runs."""
    from edgevlm.benchmarks.latency.extras import Extras
    from edgevlm.bundle import open_bundle
    from edgevlm.models import check_answers, resolve

    folder = None
    if reference:
        bundle = open_bundle(resolve(reference))
        check_answers(bundle.manifest)
        folder = bundle.folder
    own = {}
    if not peers and (checkpoint or tower or pythons):
        raise click.UsageError("--checkpoint, --vision-tower and --peer-python belong to --peers")
    if peers:
        from edgevlm.benchmarks.peers.run import own_pythons

        own = own_pythons(pythons)
    return Extras(peers=peers, checkpoint=checkpoint, tower=tower, pythons=own, reference=folder)


def _bundles(
    models: tuple[str, ...],
    made_up: tuple[str, ...],
    quants: tuple[str, ...],
    starts: Callable[[str], None],
) -> list[Bundle]:
    """The bundles named, the synthetic ones, or the default one where none is asked for."""
    from edgevlm.benchmarks.synthetic.make import synthetic
    from edgevlm.bundle import open_bundle
    from edgevlm.models import resolve

    names: tuple[str | None, ...] = models
    if not models and not made_up:
        names = (os.environ.get("EDGEVLM_MODEL") or None,)
    found = [open_bundle(resolve(name)) for name in names]
    for bundle in found:
        if bundle.manifest.text:
            raise click.UsageError(
                f"{bundle.manifest.name} embeds and answers nothing: it is measured by itself; "
                "name it alone"
            )
    return found + [synthetic(name, quant, starts) for name in made_up for quant in quants]


@bench.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--threshold",
    default="5%",
    show_default=True,
    metavar="P",
    help="Smaller changes do not matter.",
)
@click.option("--force", is_flag=True, help="Compare different machines or different work.")
def compare(a: Path, b: Path, threshold: str, force: bool) -> None:
    """Compare report B with report A (two report.json).

    A change counts when it is larger than the threshold and than the noise of both. The exit code
    is 3 when anything got worse.
    """
    from edgevlm.benchmarks.latency.compare import compare as judge
    from edgevlm.benchmarks.latency.compare import section
    from edgevlm.benchmarks.latency.report import read_report

    found = judge(read_report(a), read_report(b), threshold=_part(threshold), force=force)
    _print(section(found))
    worse = sum(d.verdict == "worse" for d in found)
    better = sum(d.verdict == "better" for d in found)
    click.echo(f"{better} better, {worse} worse, {len(found) - better - worse} neither", err=True)
    if worse:
        click.get_current_context().exit(_WORSE)


def _part(text: str) -> float:
    """ "5%" or "0.05" as 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise click.BadParameter(f"threshold {text!r} is not a number such as 5% or 0.05")
    return value


def _show(report: Report, console: Console) -> None:
    from edgevlm.benchmarks.latency.sections import sections, warnings

    summary, *rest = sections(report)
    for section in (*rest, summary):
        _print(section)
    for text in warnings(report):
        console.print(f"Note: {text}.", soft_wrap=True)


def _print(section: Section) -> None:
    """Shows a section's narrow form on stdout, if it has one."""
    if not section.narrow:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for i in section.narrow:
        table.add_column(section.head[i], justify="right" if i else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(row[i] for i in section.narrow))
    console = Console(markup=False, highlight=False)
    console.print(section.title, style="bold")
    console.print(table)
    for note in section.notes:
        console.print(note, soft_wrap=True)
    console.print()
