"""edgevlm embed"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click

from edgevlm.cleanup import write_whole
from edgevlm.cli.dual import IMAGES, DualRun, Failures, dual, each_row, pictures
from edgevlm.cli.signals import Aside


@click.command(cls=Aside)
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@IMAGES
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write .npy (float32 [n, d], texts first) or .npz (rows and names) instead of JSON lines.",
)
@dual
def embed(texts: tuple[str, ...], images: tuple[str, ...], out: Path | None, run: DualRun) -> None:
    """Print the embeddings of TEXTs and pictures: one JSON object a line, with a row of length 1.

    Rows of one model can be compared with one another: their product is the cosine.
    """
    if not texts and not images:
        raise click.UsageError("name texts, or pictures with -i")
    if out and out.suffix not in (".npy", ".npz"):
        raise click.BadParameter(f"{out}: name it .npy or .npz", param_hint="--out")
    found, failures = pictures(images), Failures()
    names: list[str] = []
    rows: list[Any] = []

    def take(kind: str, name: str, row: Any) -> None:
        if out:
            names.append(name)
            rows.append(row)
        else:
            click.echo(json.dumps({kind: name, "embedding": [round(float(x), 7) for x in row]}))

    with run.load() as model:
        for text, row in zip(texts, model.embed_text(texts) if texts else (), strict=True):
            take("text", text, row)
        if found:
            for name, row in each_row(model, found, failures):
                take("file", name, row)
    if out and rows:
        write_whole(out, _file(out, names, rows))
    failures.summarize()


def _file(out: Path, names: list[str], rows: list[Any]) -> bytes:
    import numpy as np

    file = io.BytesIO()
    if out.suffix == ".npy":
        np.save(file, np.stack(rows))
    else:
        np.savez(file, rows=np.stack(rows), names=np.array(names))
    return file.getvalue()
