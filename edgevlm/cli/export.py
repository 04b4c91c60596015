"""edgevlm export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import click

from edgevlm.cli.common import OutFolder
from edgevlm.cli.precisions import precisions
from edgevlm.cli.progress import ProgressBars, err_console, summary
from edgevlm.cli.signals import Aside
from edgevlm.export import (
    TARGETS,
    ReadOptions,
    export_bundle,
    inspect_source,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgevlm.export import Inspection


class _Choices(TypedDict):
    """Options that go to the exporter as they are."""

    name: str | None
    vision_tower: str | None
    adapter: str | None
    template: str | None
    image_fit: Literal["pad", "crop"] | None


@click.command(cls=Aside)
@click.argument("source")
@click.argument("out", type=OutFolder())
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="Kind of device, which picks the precisions not named  [default: laptop]",
)
@precisions(
    "the target's",
    "the original (needs memory for it in float32)",
    verify=None,
    unasked="where edgevlm[export] is installed",
)
@click.option("--name", metavar="NAME", help="Name of the model  [default: the source's]")
@click.option(
    "--vision-tower",
    metavar="SOURCE",
    help="Folder or hub id of the vision tower, for checkpoints without it.",
)
@click.option(
    "--adapter",
    metavar="SOURCE",
    help="Folder or hub id of a LoRA adapter that is merged into SOURCE.",
)
@click.option(
    "--template",
    metavar="NAME",
    help="Prompt template, where the family has several, such as vicuna_v1.",
)
@click.option(
    "--image-fit",
    type=click.Choice(["pad", "crop"]),
    help="Fit of a picture into the square  [default: as the checkpoint says]",
)
@click.option(
    "--part",
    "parts",
    metavar="NAME=FILE",
    multiple=True,
    help="Weight file of a model that has several, where SOURCE is not enough.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting that the files leave open or get wrong, such as stage=4.",
)
@click.option(
    "--segment-decoder",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="big_vision's vae-oid.npz, which decodes the masks of a PaliGemma.",
)
@click.option("--dry-run", is_flag=True, help="Check SOURCE and say what is in it; write nothing.")
def export(source: str, out: Path, target: str | None, quant: str | None,
           vision_precisions: tuple[str, ...], verify: bool | None, calibration: Path | None,
           dry_run: bool, parts: tuple[str, ...], settings: tuple[str, ...],
           imatrix: bool | None, languages: str, segment_decoder: Path | None,
           **choices: Unpack[_Choices]) -> None:  # fmt: skip
    """Convert the checkpoint SOURCE into the bundle OUT.

    SOURCE is a folder or a hub id such as google/paligemma-3b-mix-224, OUT a folder.
    """
    console = err_console()
    named, stated = _pairs(parts, "--part"), _pairs(settings, "--set")
    options = ReadOptions(parts=named, settings=stated, **choices)
    if dry_run:
        console.print(_report(inspect_source(source, options)))
        return
    with ProgressBars(console) as bars:
        bundle = export_bundle(
            source,
            out,
            target=target,
            quant=quant,
            vision_precision=vision_precisions,
            verify=verify,
            calibration=calibration,
            imatrix=imatrix,
            languages=languages,
            segment_decoder=segment_decoder,
            progress=bars.update,
            **vars(options),
        )
    summary(console, bundle)


def _pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", param_hint=option)
    return dict(value.split("=", 1) for value in values)


def _report(found: Inspection) -> str:
    """Describes an inspected source as text."""
    from edgevlm.cli.models import picture_text, text_text, weight_files_text

    decoder, image = found.decoder, found.image
    if found.text:
        about = [f"{found.name}: family {found.family}", f"picture   {picture_text(image)}"]
        return "\n".join([*about, f"texts     {text_text(found.text)}", *found.notes])
    lines = [
        f"{found.name}: family {found.family}",
        f"picture   {picture_text(image)}",
        f"decoder   {decoder.architecture}, width {decoder.n_embd}, {decoder.n_layer} layers, "
        f"{decoder.n_vocab} tokens, context {decoder.context_length}",
        f"prompt    {''.join(found.prompt.template)!r}",
    ]
    return "\n".join([*lines, weight_files_text(found.weight_files, found.notes, used=True)])
