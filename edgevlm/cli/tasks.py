"""edgevlm answer, caption, ground, ocr: a model's own tasks by name"""

from __future__ import annotations

from collections.abc import Callable

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
from edgevlm.cli.many import Many, ask_each, asked_task, each_source, many_options
from edgevlm.cli.signals import Aside
from edgevlm.sampling import task_options

_LANGUAGE = click.option("-l", "--language", default="en", show_default=True, help="Language code.")


@click.command(cls=Aside)
@_LANGUAGE
@click.option(
    "--length",
    type=click.Choice(["short", "normal", "long"]),
    default="normal",
    show_default=True,
    help="Length, where the model was trained on several, as Moondream2.",
)
@answering
@forms
@many_options
@json_option
def caption(
    language: str, length: str, images: tuple[str, ...], as_json: bool, run: Run, many: Many
) -> None:
    """Describe a picture, or each of many: `edgevlm ask --help` says how they are named."""
    from edgevlm.prompt import caption_task

    _run_task(caption_task(length), "", language, images, as_json, run, many)


@click.command(cls=Aside)
@answering
@forms
@many_options
@json_option
def ocr(images: tuple[str, ...], as_json: bool, run: Run, many: Many) -> None:
    """Read the text in a picture, or in each of many: `edgevlm ask --help` says how they are
    named.
    """
    _run_task("ocr", "", "en", images, as_json, run, many)


@click.command(cls=Aside)
@answering
@many_options
@json_option
def ground(images: tuple[str, ...], as_json: bool, run: Run, many: Many) -> None:
    """Describe a picture and locate what is in it; --json has the boxes. Of many, each by itself:
    `edgevlm ask --help` says how they are named.
    """
    _run_task("ground", "", "en", images, as_json, run, many)


@click.command(cls=Aside)
@click.argument("question")
@_LANGUAGE
@answering
@forms
@many_options
@json_option
def answer(
    question: str, language: str, images: tuple[str, ...], as_json: bool, run: Run, many: Many
) -> None:
    """Answer QUESTION in the model's own prompt for questions, about a picture or each of many:
    `edgevlm ask --help` says how they are named.
    """
    _run_task("answer", question, language, images, as_json, run, many, read_sources)


def _run_task(
    task: str,
    text: str,
    language: str,
    images: tuple[str, ...],
    as_json: bool,
    run: Run,
    many: Many,
    read: Callable[[tuple[str, ...]], list[str | bytes]] = read_pictures,
) -> None:
    if (sources_of_many := each_source(images, many)) is not None:
        ask_each(asked_task(task, text, language), sources_of_many, many, run, as_json=as_json)
        return
    sources = read(images)
    with run.load(sources) as vlm:
        prompt = vlm.task(task, text, language)
        options = task_options(task, vlm.manifest.answer) | run.sampling
        given = vlm.stream(prompt, sources, progress=tile_progress, **options)
        show(given, vlm, as_json=as_json, stats=run.stats)
