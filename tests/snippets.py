"""Snippets of the documentation: blocks between fences, and commands in the running text.

What becomes of a block goes by its language:

    python    runs, the blocks of a page one after the other in one namespace; a `text` block right
              after it is what it prints
    sh        each command runs, or is checked, by its first word (tests/test_snippets.py)
    console   the same; what stands below a `$` is what the command prints
    json      is JSON
    yaml, text   nobody runs these

A block with a `title` is also a file of that name.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from edgevlm.cli import cli

ROOT = Path(__file__).parent.parent
# The address of the server that pages ask.
DOCUMENTED = "http://127.0.0.1:8000"
LANGUAGES = {"python", "sh", "console", "json", "yaml", "text"}
# The first is made of the help texts, the second is filled from docstrings.
_GENERATED = {"cli.md", "api.md"}
_FENCE = re.compile(
    r"^```(?P<language>\S*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.M | re.S
)
_INLINE = re.compile(r"`(edgevlm [^`]+)`")
# SOURCE, OUT, [MODEL]..., NAME
_PLACEHOLDER = re.compile(r"[A-Z]{2,}(_[A-Z]+)*(\.\.\.)?")


@dataclass(frozen=True)
class Block:
    """A block between fences."""

    language: str
    title: str | None
    text: str


def pages() -> list[Path]:
    """The pages that people read and copy from."""
    docs = (p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in _GENERATED)
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["title"], match["text"]) for match in found]


def outside(page: Path) -> str:
    """A page's text without its blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline(page: Path) -> list[list[str]]:
    """The words of each command of ours in a page's running text."""
    return [
        words(re.sub(r"[\[\]]|\\", " ", text)) for text in _INLINE.findall(_joined(outside(page)))
    ]


def _joined(text: str) -> str:
    return re.sub(r"\s*\n(?=\S)", " ", text)


def commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """(command, what it prints or None) of an `sh` or a `console` block."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        for line in text.splitlines():
            yield from ((one, None) for one in line.split(" && ") if words(one))
        return
    for part in text.split("$ ")[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def words(command: str) -> list[str]:
    """Words of a command without its comment and the folder of an environment, and with a home's
    sign as a shell opens it.
    """
    given = shlex.split(command, comments=True)
    return [os.path.expanduser(word.removeprefix(".venv/bin/")) for word in given]


def has_placeholder(given: list[str]) -> bool:
    """True if a word stands for something that the reader has."""
    return any(_PLACEHOLDER.fullmatch(word.strip("[]")) for word in given)


def check_options(given: list[str]) -> None:
    """Raises AssertionError for a command, an option or one of few choices that edgevlm lacks."""
    command: click.Command = cli
    rest = [word for word in given[1:] if word]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        if found is None and command is not cli:
            break  # `bench` runs by default
        assert found, f"no command {rest[0]!r}: {given}"
        command, rest = found, rest[1:]
    if isinstance(command, click.Group) and command.name == "bench":
        command = command.commands["run"]
    known = {name: p for p in command.params if isinstance(p, click.Option) for name in p.opts}
    known |= dict.fromkeys(("-h", "--help"), click.Option(["--help"], is_flag=True))
    for i, word in enumerate(rest):
        name, _, value = word.partition("=")
        if not re.match(r"--?[a-z]", name):
            continue
        assert name in known, f"{command.name} has no option {name}: {given}"
        value = value or (rest[i + 1] if i + 1 < len(rest) else "")
        kind = known[name].type
        if isinstance(kind, click.Choice) and not _PLACEHOLDER.fullmatch(value):
            for choice in value.split("|"):
                assert choice in kind.choices or len(choice) == 1, f"{name} {choice}: {given}"
