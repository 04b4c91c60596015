"""edgevlm answer, caption, ground, ocr: a model's own tasks by name"""

from __future__ import annotations

import click

from edgevlm.cli.common import (
    Run,
    answering,
    json_option,
    read_pictures,
    read_sources,
    show,
    tile_progress,
)
from edgevlm.cli.forms import forms
from edgevlm.cli.signals import Aside
from edgevlm.sampling import task_options

_LANGUAGE = click.option("-l", "--language", default="en", show_default=True, help="Language code.")


@click.command(cls=Aside)
@_LANGUAGE
@answering
@forms
@json_option
def caption(language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Describe a picture."""
    _run_task("caption", language, images, as_json, run)


@click.command(cls=Aside)
@answering
@forms
@json_option
def ocr(images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Read the text in a picture."""
    _run_task("ocr", "en", images, as_json, run)


@click.command(cls=Aside)
@answering
@json_option
def ground(images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Describe a picture and locate what is in it; --json has the boxes."""
    _run_task("ground", "en", images, as_json, run)


@click.command(cls=Aside)
@click.argument("question")
@_LANGUAGE
@answering
@forms
@json_option
def answer(question: str, language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Answer QUESTION in the model's own prompt for questions."""
    sources = read_sources(images)
    with run.load(sources) as vlm:
        prompt = vlm.task("answer", question, language)
        given = vlm.stream(prompt, sources, progress=tile_progress, **run.sampling)
        show(given, vlm, as_json=as_json, stats=run.stats)


def _run_task(task: str, language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    sources = read_pictures(images)
    with run.load(sources) as vlm:
        prompt = vlm.task(task, language=language)
        options = task_options(task, vlm.manifest.answer) | run.sampling
        answer = vlm.stream(prompt, sources, progress=tile_progress, **options)
        show(answer, vlm, as_json=as_json, stats=run.stats)
