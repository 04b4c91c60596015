"""edgevlm chat"""

from __future__ import annotations

import sys

import click

from edgevlm.cli.chat.lines import Lines
from edgevlm.cli.chat.talk import Talk
from edgevlm.cli.common import Run, answering, filming, read_sources, talking
from edgevlm.cli.forms import forms
from edgevlm.cli.signals import raising

_PREVIEW = click.option("--no-preview", is_flag=True, help="Show no small picture on the terminal.")


@click.command()
@answering
@forms
@talking
@filming
@_PREVIEW
def chat(
    images: tuple[str, ...],
    run: Run,
    system: str | None,
    plain: bool,
    video: str | None,
    fps: float | None,
    no_preview: bool,
) -> None:
    """Talk about pictures or a video. /help lists what can be typed besides questions."""
    if fps is not None and video is None:
        raise click.UsageError("--fps goes with --video")
    if images and video is not None:
        raise click.UsageError("a chat begins with pictures or a --video; /image shows more")
    sources = read_sources(images)
    if sys.stdin is None:
        raise click.ClickException("stdin is closed; a chat reads its questions there")
    with run.load(sources, "chat") as vlm:
        shown = sources if video is None else vlm.read_video(video, fps)
        talk = Talk(vlm, run, vlm.chat(shown, system=system), plain, previews=not no_preview)
        talk.greet()
        _loop(talk)


def _loop(talk: Talk) -> None:
    lines = Lines()
    while not talk.ended:
        try:
            with raising():
                line = lines.read()
        except KeyboardInterrupt:
            click.echo("Ctrl-D or /exit leaves.", err=True)
            continue
        except EOFError:
            return
        talk.turn(line)
