"""/set: the sampling options of a chat."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgevlm.cli.forms import read_forms
from edgevlm.errors import PromptError
from edgevlm.image.urls import shortened
from edgevlm.sampling import Sampling, SamplingOptions

if TYPE_CHECKING:
    from edgevlm.cli.chat.talk import Talk


def _texts(value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError:
        return (value,)


def _form(name: str) -> Callable[[str], Any]:
    """A reader of an option that holds answers to a form, as the command line's options are."""

    def read(value: str) -> Any:
        given = value if name == "choices" else Path(os.path.expanduser(value))
        try:
            return read_forms({name: given})[name]
        except OSError as e:
            raise PromptError(f"{value}: cannot be read ({e.strerror})") from None

    return read


# Options that can be set here, and how a value is read.
OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "a whole number"),
    "temperature": (float, "a number"),
    "top_k": (int, "a whole number"),
    "top_p": (float, "a number"),
    "min_p": (float, "a number"),
    "repetition_penalty": (float, "a number"),
    "seed": (int, "a whole number"),
    "stop": (_texts, "texts"),
    "choices": (_form("choices"), "texts between commas"),
    "schema": (_form("schema"), "a file"),
    "grammar": (_form("grammar"), "a file"),
}


def set_option(talk: Talk, argument: str) -> None:
    """Sets an option of the next answers, or lists all. Raises PromptError."""
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        click.echo(listing(talk.sampling, talk.vlm.manifest.answer.max_tokens), err=True)
        return
    if name not in OPTIONS:
        raise PromptError(f"{name}: no such option; one of {', '.join(OPTIONS)}")
    if value:
        talk.sampling = changed(talk.sampling, name, value)
    shown = listing(talk.sampling, talk.vlm.manifest.answer.max_tokens, only=name)
    click.echo(shown, err=True)


def changed(options: SamplingOptions, name: str, value: str) -> SamplingOptions:
    """The options with another value, "none" for the default. Raises PromptError."""
    values: dict[str, Any] = {**options}
    values.pop(name, None)
    if value != "none":
        read, kind = OPTIONS[name]
        try:
            values[name] = read(value)
        except ValueError:
            raise PromptError(f"{name} must be {kind}, not {value}") from None
    made = cast(SamplingOptions, values)
    Sampling.of(made)
    return made


def listing(options: SamplingOptions, longest: int, only: str | None = None) -> str:
    """Each option with its value, a line each."""
    defaults = {"max_tokens": f"the model's, {longest}", "seed": "a new one each time"}
    sampling = Sampling.of(options)
    lines = []
    for name in (only,) if only else OPTIONS:
        value = getattr(sampling, name)
        shown = defaults.get(name, "none") if value in (None, ()) else value
        if isinstance(shown, tuple):
            shown = shlex.join(shown)
        lines.append(f"{name} {shortened(str(shown))}")
    return "\n".join(lines)
