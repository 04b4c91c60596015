"""The commands of a chat: one table, which help, completion and dispatch are made of."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgevlm.cli.chat import pictures, settings
from edgevlm.errors import PromptError

if TYPE_CHECKING:
    from edgevlm.cli.chat.talk import Talk

Completion = Literal["", "pictures", "videos", "files", "settings", "none"]
# Longer words of a question that is shown again are cut.
_SHOWN = 60
_WIDEST = 92
_ELSE = (
    "A picture or a video that is dropped on the prompt, or its path or a picture's URL alone, is "
    "looked at. Anything else goes to the model as it is; what begins with a slash, after a space. "
    "Three quotes begin and end a question of several lines; Alt-Enter is a line break. Ctrl-C "
    "stops an answer, Ctrl-D leaves."
)


@dataclass(frozen=True)
class ChatCommand:
    """A command: its name, its argument and its line in the help, what it does with the argument
    ("" without one), what completes it, and further names.
    """

    name: str
    argument: str
    help: str
    run: Callable[[Talk, str], None]
    completion: Completion = ""
    others: tuple[str, ...] = ()


def help_text(columns: int) -> str:
    """All that can be typed, within so many columns."""
    formatter = click.HelpFormatter(width=min(columns - 1, _WIDEST))
    rows = [(f"{c.name} {c.argument}".strip(), c.help) for c in COMMANDS]
    formatter.write_dl(rows, col_max=min(34, columns // 2))
    return formatter.getvalue() + click.wrap_text(_ELSE, formatter.width)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _clear(talk: Talk, _: str) -> None:
    talk.chat.clear()
    stay = pictures.pictures_text(talk.chat)
    _say(f"Forgot the conversation{f'; still looking at {stay}' if stay else ''}.")


def _undo(talk: Talk, _: str) -> None:
    question = " ".join(talk.chat.undo().split())
    cut = f"{question[:_SHOWN]}..." if len(question) > _SHOWN else question
    _say(f"Took back: {cut}")


def _system(talk: Talk, argument: str) -> None:
    if argument == "none":
        talk.chat.system = None
    elif argument:
        talk.chat.system = argument
    if talk.chat.system is None:
        _say("No system message but the template's own words, if it has any.")
    else:
        _say(_printable(f"System message: {talk.chat.system}"))


def _file(argument: str, name: str) -> Path:
    """The file that an argument names, quoted or not."""
    if not argument:
        raise PromptError(f"{name} needs a file's name, such as {name} kitchen.chat")
    try:
        words = shlex.split(argument) if os.name != "nt" else [argument.strip('"')]
    except ValueError:  # a quote that nothing closes is part of the name
        words = [argument]
    return Path(os.path.expanduser(words[0] if len(words) == 1 else argument))


def _save(talk: Talk, argument: str) -> None:
    file = _file(argument, "/save")
    talk.chat.save(file)
    _say(f"Saved {_counted(talk)} to {file}; /load goes on with them.")


def _load(talk: Talk, argument: str) -> None:
    talk.chat.load(_file(argument, "/load"))
    pictures.look_at(talk)
    looking = pictures.pictures_text(talk.chat)
    _say(f"Loaded {_counted(talk)}{f'; looking at {looking}' if looking else ''}.")
    if talk.chat.turns:
        question, answer = talk.chat.turns[-1]
        _say(_printable(f"> {question}\n{answer.reply.text}"))


def _printable(text: str) -> str:
    """A text of somebody's file, which may move no cursor."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _counted(talk: Talk) -> str:
    n = len(talk.chat.turns)
    return f"{n} question{'' if n == 1 else 's'}"


def _help(_: Talk, __: str) -> None:
    _say(help_text(shutil.get_terminal_size().columns))


def _exit(talk: Talk, _: str) -> None:
    talk.ended = True


COMMANDS = (
    ChatCommand(
        "/image", "PATH|URL ...",
        "Look at a picture, or several; /image clipboard, /image none. In a conversation, models "
        "that take several keep the earlier ones.",
        pictures.image, "pictures",
    ),
    ChatCommand(
        "/video", "FILE [--fps N]",
        "Look at a video, N frames of each second, where the model was trained on videos.",
        pictures.video, "videos",
    ),
    ChatCommand("/clear", "", "Forget the conversation; the pictures stay.", _clear),
    ChatCommand("/retry", "", "Ask the last question again.", lambda talk, _: talk.retry()),
    ChatCommand("/undo", "", "Take the last question and its answer back.", _undo),
    ChatCommand(
        "/system", "TEXT", "Set the system message; /system none for the template's own.", _system,
        "none",
    ),
    ChatCommand(
        "/set", "NAME VALUE", "Set a sampling option, such as temperature 0.2; /set lists them.",
        settings.set_option, "settings",
    ),
    ChatCommand("/save", "FILE", "Save the conversation with what it is about.", _save, "files"),
    ChatCommand("/load", "FILE", "Go on with a conversation that was saved.", _load, "files"),
    ChatCommand("/stats", "", "How long the last answer took.", lambda talk, _: talk.stats()),
    ChatCommand("/help", "", "This text.", _help, others=("/?",)),
    ChatCommand("/exit", "", "Leave.", _exit, others=("/quit", "/bye")),
)  # fmt: skip
