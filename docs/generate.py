"""Writes docs/cli.md from the help texts; `--check` only compares (tests/test_docs.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgevlm.cli import cli

TARGET = Path(__file__).parent / "cli.md"
_HEAD = "# The command line\n\nMade by `make docs` from the help texts.\n"


def reference() -> str:
    """The help text of every command, as Markdown."""
    return "\n".join(
        [_HEAD, *_sections(cli, click.Context(cli, info_name="edgevlm", **cli.context_settings))]
    )


def _sections(command: click.Command, context: click.Context) -> list[str]:
    context.terminal_width = context.max_content_width = 92
    found = [f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found += _sections(child, click.Context(child, parent=context, info_name=name))
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(reference(), encoding="utf-8")
    sys.exit(TARGET.read_text(encoding="utf-8") != reference())
