"""edgevlm requantize"""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import OutFolder
from edgevlm.cli.precisions import precisions
from edgevlm.cli.progress import ProgressBars, err_console, summary
from edgevlm.cli.signals import Aside
from edgevlm.export import requantize_bundle
from edgevlm.models import resolve


@click.command(cls=Aside)
@click.argument("bundle")
@click.argument("out", type=OutFolder())
@precisions("as it is", "the old bundle")
def requantize(bundle: str, out: Path, quant: str | None, vision_precisions: tuple[str, ...],
               verify: bool, calibration: Path | None, imatrix: bool | None,
               languages: str) -> None:  # fmt: skip
    """Write BUNDLE at other precisions into OUT, without its checkpoint.

    From a decoder in f32, f16 or bf16, and a vision encoder and a text tower in fp32 or fp16; what
    is quantized already is not quantized again. --languages takes any decoder.
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
            languages=languages,
            progress=bars.update,
        )
    summary(console, made)
