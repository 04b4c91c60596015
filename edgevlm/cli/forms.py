"""Options that hold an answer to a form."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgevlm.errors import PromptError
from edgevlm.schema import parsed

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("--json-schema", "schema", type=_FILE, metavar="FILE",
                 help="Answer in JSON that fits the schema in FILE."),
    click.option("--choices", metavar="A,B,C", help="Answer with one of these."),
    click.option("--grammar", type=_FILE, metavar="FILE",
                 help="Answer in what the grammar (llama.cpp's GBNF) in FILE describes."),
)  # fmt: skip


def forms(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --json-schema, --choices and --grammar."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_forms(given: dict[str, Any]) -> dict[str, Any]:
    """The options with the files' contents and the list of choices in their places; raises
    PromptError for a file that does not hold what it should.
    """
    read: dict[str, Callable[[Any], Any]] = {"schema": _json, "choices": _listed, "grammar": _text}
    return {name: read[name](v) if name in read else v for name, v in given.items()}


def _listed(choices: str) -> list[str]:
    """The choices between the commas; one with a comma stands in quotes."""
    (row,) = csv.reader([choices], skipinitialspace=True)
    return [choice.strip() for choice in row]


def _json(file: Path) -> Any:
    try:
        return parsed(_text(file))
    except ValueError as e:
        raise PromptError(f"{file}: not JSON ({e})") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise PromptError(f"{file}: not text in UTF-8 (byte {e.start})") from None
