"""edgevlm classify"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from edgevlm.cli.dual import IMAGES, DualRun, Failures, dual, each_row, pictures
from edgevlm.cli.signals import Aside

if TYPE_CHECKING:
    from edgevlm.types import LabelScore


@click.command(cls=Aside)
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
@IMAGES
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Text in which {} stands for a label, {} alone for none; several are averaged  "
    "[default: the model's own]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for every picture.")
@dual
def classify(
    labels: tuple[str, ...],
    images: tuple[str, ...],
    templates: tuple[str, ...],
    as_json: bool,
    run: DualRun,
) -> None:
    """Say which LABEL a picture fits best: labels with their scores, the best first.

    A CLIP's scores share 1; a SigLIP's are the probability of each label by itself.
    """
    if not images:
        raise click.UsageError("name a picture with -i")
    found, failures = pictures(images), Failures()
    with run.load() as model:
        rows = model.embed_labels(labels, templates or None)
        for name, row in each_row(model, found, failures):
            scores = model.scored(row, labels, rows)
            if as_json:
                listed = [dataclasses.asdict(score) for score in scores]
                click.echo(json.dumps({"file": name, "labels": listed}))
            else:
                _show(name if len(found) > 1 else "", scores)
    failures.summarize()


def _show(name: str, scores: list[LabelScore]) -> None:
    if name:
        listed = ", ".join(f"{s.label} {s.score:.4f}" for s in scores)
        click.echo(f"{name}: {listed}")
        return
    for score in scores:
        click.echo(f"{score.score:.4f}  {score.label}")
