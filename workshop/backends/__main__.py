"""`python -m workshop.backends openvino|vulkan|plugins`: a back end as a table.

The first run makes an environment in the cache folder (`--environment` names another): this one
with the packages of that back end before it. Nothing here is changed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from edgevlm.benchmarks.latency.files import default_picture
from edgevlm.errors import EdgeVLMError
from edgevlm.models import built_in, resolve
from workshop.backends import compare, environment


@click.command()
@click.argument("job", type=click.Choice(sorted(environment.jobs())))
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--environment", "folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tiny", is_flag=True, help="Models of random weights, exported now, as well.")
@click.option("--here", is_flag=True, help="Compare in this environment.")
def main(job: str, models: tuple[str, ...], folder: Path | None, tiny: bool, here: bool) -> None:
    """Compare a back end with the CPU on MODELs, pico if none is named.

    "plugins" lists what onnxruntime's plugin providers offer and which words choose them.
    """
    chosen = environment.jobs()[job]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [resolve(m).absolute() for m in models] or [built_in()]
        if tiny:
            folders += _tiny(Path(scratch), chosen.part)
        if here and chosen.part == "choice":
            click.echo(compare.table(compare.CHOICE_HEAD, compare.choices()))
            return
        if not here:
            names = [str(f) for f in folders]
            raise SystemExit(environment.run(chosen, names, folder))
        # Nothing compiled or compared before: the first start is one.
        os.environ["EDGEVLM_HOME"] = scratch
        picture = default_picture(Path(scratch))
        row = {"vision": compare.vision, "decoder": compare.decoder}[chosen.part]
        head = {"vision": compare.VISION_HEAD, "decoder": compare.DECODER_HEAD}[chosen.part]
        click.echo(compare.table(head, [row(f, chosen.word, picture) for f in folders]))


def _tiny(scratch: Path, part: str) -> list[Path]:
    """Bundles of both attentions at full precision and at one that is used."""
    from edgevlm.export import export_bundle
    from tests.checkpoints.llava import write_llava
    from tests.checkpoints.paligemma import write_paligemma

    sources = (
        write_paligemma(scratch / "tiny-paligemma"),
        write_llava(scratch / "tiny-mobilepalo"),
    )
    precisions = (("f32", "fp32"), ("q4_k_m", "int8"))
    folders = []
    for source in sources:
        for quant, vision in precisions:
            folders.append(scratch / f"{source.name}-{vision if part == 'vision' else quant}")
            export_bundle(source, folders[-1], quant=quant, vision_precision=vision, verify=False)
    return folders


if __name__ == "__main__":
    try:
        main()
    except EdgeVLMError as error:
        raise SystemExit(str(error)) from None
