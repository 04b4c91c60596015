"""edgevlm ask"""

from __future__ import annotations

import click

from edgevlm.cli.common import Run, answering, json_option, read_sources, show, tile_progress
from edgevlm.cli.forms import forms
from edgevlm.cli.signals import Aside


@click.command(cls=Aside)
@click.argument("prompt")
@answering
@forms
@json_option
def ask(prompt: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Answer PROMPT about a picture, streamed.

    The prompt goes to the model as it is; PaliGemma models know "answer en QUESTION",
    "caption en", "detect THING ; THING" and "ocr".
    """
    sources = read_sources(images)
    with run.load(sources) as vlm:
        answer = vlm.stream(prompt, sources, progress=tile_progress, **run.sampling)
        show(answer, vlm, as_json=as_json, stats=run.stats)
