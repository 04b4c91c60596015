"""edgevlm export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import click
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from edgevlm.export import QUANTS, VISION_PRECISIONS, export_bundle, inspect_source
from edgevlm.types import Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgevlm.export import Inspection


class _Choices(TypedDict):
    """Options that go to the exporter as they are."""

    name: str | None
    vision_tower: str | None
    template: str | None
    image_fit: Literal["pad", "crop"] | None


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    type=click.Choice(QUANTS),
    default="q4_k_m",
    show_default=True,
    help="Of the language decoder.",
)
@click.option(
    "--vision-precision",
    "vision_precisions",
    type=click.Choice(VISION_PRECISIONS),
    multiple=True,
    help="Of the vision encoder; repeatable, the main one first  [default: int8]",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare every stage with the original (needs memory for it in float32).",
)
@click.option("--name", metavar="NAME", help="Of the model  [default: the source's]")
@click.option(
    "--vision-tower",
    metavar="SOURCE",
    help="Folder or hub id of the vision tower, for checkpoints without it.",
)
@click.option(
    "--template",
    metavar="NAME",
    help="Prompt template, where the family has several, such as vicuna_v1.",
)
@click.option(
    "--image-fit",
    type=click.Choice(["pad", "crop"]),
    help="How a picture becomes square  [default: as the checkpoint says]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Pictures like those the model will see, for precisions that measure their ranges.",
)
@click.option(
    "--part",
    "parts",
    metavar="NAME=FILE",
    multiple=True,
    help="A file of a model that is assembled from several, where SOURCE is not enough.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="What the files leave open or get wrong, such as stage=4.",
)
@click.option("--dry-run", is_flag=True, help="Check SOURCE and say what is in it; write nothing.")
def export(source: str, out: Path, quant: str, vision_precisions: tuple[str, ...], verify: bool,
           calibration: Path | None, dry_run: bool, parts: tuple[str, ...],
           settings: tuple[str, ...], **choices: Unpack[_Choices]) -> None:  # fmt: skip
    """Convert the checkpoint SOURCE into the bundle OUT.

    SOURCE is a folder or a hub id such as google/paligemma-3b-mix-224, OUT a folder.
    """
    from edgevlm.cli.models import parity_table, pieces_text

    console = Console(stderr=True, markup=False, highlight=False)
    named, stated = _pairs(parts, "--part"), _pairs(settings, "--set")
    if dry_run:
        console.print(_report(inspect_source(source, parts=named, settings=stated, **choices)))
        return
    with _Bars(console) as bars:
        bundle = export_bundle(
            source,
            out,
            quant=quant,
            vision_precision=vision_precisions or "int8",
            calibration=calibration,
            verify=verify,
            parts=named,
            settings=stated,
            progress=bars.update,
            **choices,
        )
    if bundle.manifest.pieces:
        console.print(pieces_text(bundle.manifest.pieces, bundle.manifest.notes))
    if bundle.manifest.parity:
        console.print(parity_table(bundle))
    console.print(f"{out}: {bundle.bytes / 2**20:.1f} MiB")
    console.print(f"Try it: edgevlm chat -m {out} -i PICTURE")


def _pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", param_hint=option)
    return dict(value.split("=", 1) for value in values)


def _report(found: Inspection) -> str:
    """What an export would make of its source, as text."""
    from edgevlm.cli.models import pieces_text

    decoder, image = found.decoder, found.image
    lines = [
        f"{found.name}: family {found.family}",
        f"picture   {image.size} px ({image.fit}), {image.tokens} tokens",
        f"decoder   {decoder.architecture}, width {decoder.n_embd}, {decoder.n_layer} layers, "
        f"{decoder.n_vocab} tokens, context {decoder.context_length}",
        f"prompt    {''.join(found.prompt.template)!r}",
    ]
    return "\n".join([*lines, pieces_text(found.pieces, found.notes, used=True)])


class _Bars:
    """A progress bar for each stage, with sizes and times."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}", justify="right"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def update(self, progress: Progress) -> None:
        """Moves the stage's bar, making it when the stage is new."""
        if not self._tasks:
            self._bars.start()
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, amount="")
        self._bars.update(
            self._tasks[progress.stage],
            completed=progress.done,
            total=progress.total,
            amount=_amount(progress),
        )


def _amount(progress: Progress) -> str:
    if progress.unit == "B":
        return f"{progress.done / 2**20:.0f}/{progress.total / 2**20:.0f} MiB"
    return f"{progress.done}/{progress.total} {progress.unit}"
