"""`python -m edgevlm.benchmarks.peers MODEL`: edgevlm beside others, as a Markdown table."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from edgevlm.benchmarks.latency.files import default_picture
from edgevlm.benchmarks.latency.sections import peers_section
from edgevlm.benchmarks.latency.tables import section_markdown
from edgevlm.benchmarks.peers.run import Comparison, beside, own_pythons
from edgevlm.bundle import open_bundle
from edgevlm.errors import EdgeVLMError
from edgevlm.models import resolve

PROMPT = "What is in the picture?"


@click.command()
@click.argument("model")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="MODEL's origin.")
@click.option("--vision-tower", type=click.Path(exists=True, path_type=Path))
@click.option("-i", "--image", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--tokens",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Generated after the first.",
)
@click.option("--threads", type=click.IntRange(1), help="[default: cores]")
@click.option("--only", multiple=True, metavar="PEER", help="Repeatable  [default: all]")
@click.option(
    "--python", "pythons", multiple=True, metavar="PEER=PYTHON", help="An environment of its own."
)
def main(model: str, checkpoint: Path | None, vision_tower: Path | None, image: Path | None,
         prompt: str, rounds: int, tokens: int, threads: int | None, only: tuple[str, ...],
         pythons: tuple[str, ...]) -> None:  # fmt: skip
    """Compare MODEL, a bundle folder or an installed name, in edgevlm and elsewhere."""
    try:
        bundle = open_bundle(resolve(model))
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(
                bundle=bundle,
                image=image or default_picture(Path(folder)),
                words=prompt,
                checkpoint=checkpoint,
                tower=vision_tower,
                rounds=rounds,
                tokens=tokens,
                threads=threads,
                pythons=own_pythons(pythons),
                only=only,
            )
            found = beside(
                comparison, bundle.manifest.name, lambda text: click.echo(text, err=True)
            )
    except EdgeVLMError as e:
        raise click.ClickException(str(e)) from None
    click.echo(section_markdown(peers_section(found)))


if __name__ == "__main__":
    sys.exit(main())
