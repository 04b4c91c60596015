"""/image and /video: what a chat is about."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click
from PIL import Image, ImageGrab

from edgevlm.errors import ImageError, PromptError
from edgevlm.image import ImageSource, Picture
from edgevlm.image.names import each_located, located
from edgevlm.image.urls import one_line, shortened, without_credentials
from edgevlm.runtimes.messages import several
from edgevlm.video import Video

if TYPE_CHECKING:
    from edgevlm.cli.chat.talk import Talk
    from edgevlm.runtimes.chat import Chat

_CLIPBOARD = "the clipboard"
_FPS = re.compile(r"(?:^|\s)--fps(?:[\s=]+(\S*))?(?=\s|$)")


def image(talk: Talk, argument: str) -> None:
    """Looks at the pictures that an argument names; says so. Raises ImageError, PromptError."""
    if argument in ("", "none"):
        talk.chat.image = None
        click.echo("Looking at no picture.", err=True)
    else:
        sources = from_clipboard() if argument == "clipboard" else each_located(argument)
        _look(talk, [*sources])


def video(talk: Talk, argument: str) -> None:
    """Looks at the video that an argument names, with --fps N in it; says so. Raises ImageError,
    PromptError.
    """
    name, fps = _with_fps(argument)
    if not name:
        raise PromptError("/video needs a file's name, such as /video clip.mp4 --fps 1")
    _look(talk, [talk.vlm.read_video(name, fps)])


def _with_fps(argument: str) -> tuple[str, float | None]:
    found = _FPS.search(argument)
    if found is None:
        return argument, None
    try:
        fps = float(found[1] or "")
    except ValueError:
        raise PromptError("--fps needs a number, such as --fps 0.5") from None
    return (argument[: found.start()] + argument[found.end() :]).strip(), fps


def _look(talk: Talk, sources: list[ImageSource | Video]) -> None:
    chat, most = talk.chat, talk.vlm.manifest.image.max_pictures
    if len(sources) > most:
        raise PromptError(f"{len(sources)} pictures at once; {talk.name} takes {most}")
    begun = chat.begun
    if begun and chat.takes_more_images:
        # Those that nothing was asked about yet give way: they may be too large for the context.
        chat.next_image = sources
        seen = len(several(chat.image)) - len(sources)
        look_at(talk, seen)
        stays = f"; {_named(chat, 0, seen)} stay{'s' if seen == 1 else ''} in the conversation"
        more = " as well" if seen else ""
        click.echo(f"Looking at {_named(chat, seen, None)}{more}{stays if seen else ''}.", err=True)
        return
    chat.image = sources
    look_at(talk)
    afresh = (
        f" {talk.name} takes pictures with the first question only: the conversation starts afresh."
    )
    click.echo(f"Looking at {pictures_text(chat)}.{afresh if begun else ''}", err=True)


def look_at(talk: Talk, first: int = 0) -> None:
    """Shows small pictures of what is looked at on the terminal, from one on."""
    from edgevlm.cli.preview import show_preview

    if talk.previews:
        for _, shown in _shown(talk.chat)[first:]:
            show_preview(shown.frames[0] if isinstance(shown, Video) else shown.rgb)


def pictures_text(chat: Chat) -> str:
    """The pictures that a chat is about by name and size, its videos by name, frames and duration;
    empty for none.
    """
    return _named(chat, 0, None)


def _named(chat: Chat, first: int, last: int | None) -> str:
    texts = []
    for source, shown in _shown(chat)[first:last]:
        if isinstance(shown, Video):
            what = f"{len(shown.frames)} frames of {shown.duration:.1f} s"
        else:
            height, width = shown.rgb.shape[:2]
            what = f"{width} x {height}"
        texts.append(f"{_name(source)} ({what})")
    return ", ".join(texts)


def _shown(chat: Chat) -> list[tuple[ImageSource | Video, Picture | Video]]:
    """The pictures and videos that a chat is about in order: where each came from, and itself."""
    pictures = iter(chat.pictures)
    return [
        (source, source if isinstance(source, Video) else next(pictures))
        for source in several(chat.image)
    ]


def _name(source: ImageSource | Video) -> str:
    if isinstance(source, Video):
        return _name(source.source) if source.source else "the video"
    if isinstance(source, str):
        return shortened(without_credentials(str(located(source))))
    return "the picture" if isinstance(source, bytes) else _CLIPBOARD


def from_clipboard() -> list[ImageSource]:
    """The picture in the clipboard, or the names of files there. Raises ImageError."""
    try:
        found = ImageGrab.grabclipboard()
    except NotImplementedError:
        raise ImageError(
            _CLIPBOARD, "cannot be read here; install wl-clipboard (Wayland) or xclip (X11)"
        ) from None
    except Exception as e:  # Without a display, or of a picture that Pillow does not read.
        raise ImageError(_CLIPBOARD, f"cannot be read ({one_line(e)})") from None
    if isinstance(found, Image.Image):
        return [found]
    if found:
        return [*found]
    raise ImageError(_CLIPBOARD, "holds no picture; copy one first")
