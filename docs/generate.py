"""Writes docs/cli.md from the help texts and docs/faults.md from the tests that show what happens;
`--check` only compares (tests/test_docs.py).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from edgevlm.cli import cli

_HERE = Path(__file__).parent
_TESTS = _HERE.parent / "tests"
_CLI_HEAD = "# The command line\n\nMade by `make docs` from the help texts.\n"
_FAULTS_HEAD = """\
# Faults

Disks fill up, networks fail, processes are killed, files are damaged. Each row below is a test that
makes it happen; this page is made from them by `make docs`. `python -m workshop.interrupts --times
100` kills exports at random moments, `make soak` asks from eight threads and looks at every answer
and at the memory.
"""


def reference() -> str:
    """The help text of every command, as Markdown."""
    return "\n".join(
        [
            _CLI_HEAD,
            *_sections(cli, click.Context(cli, info_name="edgevlm", **cli.context_settings)),
        ]
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


def faults() -> str:
    """A table of every fault that a test makes happen: (where, what, outcome, test)."""
    rows: dict[str, list[str]] = {}
    for path in sorted(_TESTS.glob("test_*.py")):
        for test, (where, what, outcome) in _marked(path):
            name = f"`{path.name}`: {test.removeprefix('test_').replace('_', ' ')}"
            rows.setdefault(where, []).append(f"| {what} | {outcome} | {name} |")
    head = "| what happens | what edgevlm does | the test |\n|---|---|---|"
    tables = (f"## {where}\n\n{head}\n" + "\n".join(rows[where]) + "\n" for where in sorted(rows))
    return "\n".join([_FAULTS_HEAD, *tables])


def _marked(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Names of the tests in a file that are marked as one of a fault, and the mark's words."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    yield node.name, [ast.literal_eval(word) for word in mark.args]


PAGES: Mapping[str, Callable[[], str]] = {"cli.md": reference, "faults.md": faults}


if __name__ == "__main__":
    for page, made in PAGES.items():
        if sys.argv[1:] != ["--check"]:
            (_HERE / page).write_text(made(), encoding="utf-8")
    sys.exit(any((_HERE / p).read_text(encoding="utf-8") != made() for p, made in PAGES.items()))
