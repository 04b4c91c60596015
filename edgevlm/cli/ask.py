"""edgevlm ask"""

from __future__ import annotations

import click

from edgevlm.cli.common import (
    Run,
    answering,
    filming,
    json_option,
    read_sources,
    show,
    talking,
    tile_progress,
)
from edgevlm.cli.forms import forms
from edgevlm.cli.many import Asked, Many, ask_each, each_source, many_options
from edgevlm.cli.signals import Aside


@click.command(cls=Aside)
@click.argument("prompt")
@answering
@forms
@talking
@many_options
@filming
@json_option
def ask(
    prompt: str,
    images: tuple[str, ...],
    as_json: bool,
    run: Run,
    many: Many,
    system: str | None,
    plain: bool,
    video: str | None,
    fps: float | None,
) -> None:
    """Answer PROMPT about a picture, streamed, or about each of many.

    The prompt goes to the model as it is; PaliGemma models know "answer en QUESTION",
    "caption en", "detect THING ; THING" and "ocr".

    Several -i are one request about all of them. An IMAGE that is a folder, or a pattern in
    quotes such as "photos/**/*.jpg", stands for its pictures, and then each picture is asked
    about by itself; so it is with --each or --jsonl OUT.

    A --video is shown as frames with their times, to models that were trained so.
    """
    if video is not None or fps is not None:
        _check(video, images, many)
    elif (sources_of_many := each_source(images, many)) is not None:
        asked = Asked(lambda _: prompt, system=system)
        ask_each(asked, sources_of_many, many, run, as_json=as_json)
        return
    sources = read_sources(images)
    with run.load(sources) as vlm:
        seen = sources if video is None else vlm.read_video(video, fps)
        answer = vlm.stream(prompt, seen, system=system, progress=tile_progress, **run.sampling)
        show(answer, vlm, as_json=as_json, stats=run.stats, markdown=not plain)


def _check(video: str | None, images: tuple[str, ...], many: Many) -> None:
    """Raises UsageError for what does not go with a video."""
    if video is None:
        raise click.UsageError("--fps goes with --video")
    if images or many != Many(each=False, recursive=False, jsonl=None, overwrite=False):
        raise click.UsageError("--video is asked about alone, without pictures and their options")
