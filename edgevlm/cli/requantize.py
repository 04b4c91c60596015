"""edgevlm requantize"""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import OutFolder
from edgevlm.cli.progress import ProgressBars, err_console, summary
from edgevlm.cli.signals import Aside
from edgevlm.export import QUANTS, VISION_PRECISIONS, requantize_bundle
from edgevlm.models import resolve


@click.command(cls=Aside)
@click.argument("bundle")
@click.argument("out", type=OutFolder())
@click.option(
    "--quant",
    type=click.Choice(QUANTS),
    metavar="QUANT",
    help="Precision of the decoder, one of `edgevlm export`'s  [default: as it is]",
)
@click.option(
    "--vision-precision",
    "vision_precisions",
    type=click.Choice(VISION_PRECISIONS),
    multiple=True,
    help="Precision of the vision encoder; repeatable, the main one first  [default: as it is]",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare every stage with the old bundle.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Pictures like those the model will see, for precisions that measure their ranges.",
)
@click.option(
    "--imatrix/--no-imatrix",
    default=None,
    help="Round the decoder's weights by how much they matter to pictures and prompts "
    "[default: for quants that need it]",
)
def requantize(bundle: str, out: Path, quant: str | None, vision_precisions: tuple[str, ...],
               verify: bool, calibration: Path | None, imatrix: bool | None) -> None:  # fmt: skip
    """Write BUNDLE at other precisions into OUT, without its checkpoint.

    From a decoder in f32, f16 or bf16 and a vision encoder in fp32 or fp16; what is quantized
    already is not quantized again.
    """
    console = err_console()
    with ProgressBars(console) as bars:
        made = requantize_bundle(
            resolve(bundle),
            out,
            quant=quant,
            vision_precision=vision_precisions,
            verify=verify,
            calibration=calibration,
            imatrix=imatrix,
            progress=bars.update,
        )
    summary(console, made)
