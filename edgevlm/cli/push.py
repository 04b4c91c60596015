"""edgevlm push"""

from __future__ import annotations

import click

from edgevlm.bundle import open_bundle
from edgevlm.cli.names import InstalledName
from edgevlm.cli.progress import ProgressBars, err_console, mib
from edgevlm.cli.signals import Aside
from edgevlm.hub.upload import upload
from edgevlm.models import resolve


@click.command(cls=Aside)
@click.argument("model", type=InstalledName())
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(model: str, repo: str, private: bool) -> None:
    """Upload MODEL, a bundle folder or an installed name, to ORG/NAME on the hub.

    Whoever pulls it needs no export. A model card with sizes, parity and licence goes with it where
    the repository has none.
    """
    console = err_console()
    with ProgressBars(console) as bars:
        bundle = open_bundle(resolve(model), check="full", progress=bars.update)
    console.print(
        f"Uploading {mib(bundle.bytes)} to {repo}, licence {bundle.manifest.license or 'unknown'}."
    )
    click.echo(upload(bundle, repo, private=private))
