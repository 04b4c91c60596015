"""Every command alike: options, help at any width, narrow encodings, no colours where none are
wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import edgevlm
from edgevlm.cli import cli
from tests.test_cli import Terminal, edge

__all__ = ["edge"]  # a fixture

# The short form of an option is the same wherever it is, and stands for nothing else.
SHORT = {
    "-h": "--help",
    "-i": "--image",
    "-l": "--language",
    "-m": "--model",
    "-n": "--limit",
    "-o": "--output",
    "-r": "--recursive",
}
# Options that say something else of another command, and nothing contrary.
OTHERWISE = {
    "--device", "--dry-run", "--image", "--json", "--model", "--name", "--out", "--output",
    "--quant", "--template", "--threads", "--threshold", "--verify", "--vision-precision",
    "--vision-tower",
}  # fmt: skip


def walked() -> Iterator[tuple[str, click.Command, click.Context]]:
    """(name as it is typed, command, context) of every command and group."""
    todo: list[tuple[click.Command, click.Context]] = [
        (cli, cli.context_class(cli, info_name="edgevlm", **cli.context_settings))
    ]
    while todo:
        command, context = todo.pop()
        yield context.command_path, command, context
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child
                todo.append((child, child.context_class(child, parent=context, info_name=name)))


COMMANDS = [name for name, *_ in walked()]


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command, context in walked():
        yield from ((name, p) for p in command.get_params(context) if isinstance(p, click.Option))


def test_every_command_is_walked() -> None:
    assert {"edgevlm", "edgevlm ask", "edgevlm bench run", "edgevlm models show"} <= set(COMMANDS)
    assert len(COMMANDS) == len(set(COMMANDS)) > 25


def test_short_options_are_the_same_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for _, option in options():
        (first, *_) = [name for name in option.opts if name.startswith("--")]
        for short in set(option.opts) - {n for n in option.opts if n.startswith("--")}:
            found.setdefault(short, set()).add(first)
        # Whoever has the long one has the short one.
        expected = {short for short, long in SHORT.items() if long == first}
        assert expected <= set(option.opts), option.opts
    assert found == {short: {long} for short, long in SHORT.items()}


def test_an_option_of_one_name_is_one_thing() -> None:
    found: dict[str, set[tuple[str | None, str | None, str]]] = {}
    for _, option in options():
        for name in option.opts:
            about = (option.help, option.metavar, option.type.name)
            found.setdefault(name, set()).add(about)
    several = {name for name, kinds in found.items() if name[:2] == "--" and len(kinds) > 1}
    assert several == OTHERWISE


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_help_fits_the_terminal(width: int) -> None:
    for name, command, context in walked():
        context.terminal_width = context.max_content_width = width
        for line in command.get_help(context).splitlines():
            # An option with its own values is not broken.
            assert len(line) <= width or re.fullmatch(r"  --?\S.*", line), f"{name}: {line}"
        assert command.get_help(context).startswith("Usage: edgevlm")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_wrong_option(name: str, edge: Terminal) -> None:
    command = name.split()[1:]
    for flag in ("-h", "--help"):
        code, out, err = edge(*command, flag)
        assert (code, err) == (0, "") and out.startswith(f"Usage: {name}")
    code, out, err = edge(*command, "--no-such-option")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("edgevlm: No such option") and "--help`" in err


def test_the_version(edge: Terminal) -> None:
    assert edge("--version") == (0, f"edgevlm, version {edgevlm.__version__}\n", "")


# Prints what commands print to a terminal of its own kind.
SCRIPT = """
import json, sys
from edgevlm import cli
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code not in (0, None):
            sys.exit(f"{words}: {ended.code}")
"""
SHOWN = [["edgevlm", "doctor"], ["edgevlm", "du"], ["edgevlm", "gc", "--dry-run"],
         ["edgevlm", "models"], ["edgevlm", "models", "--all"],
         ["edgevlm", "models", "show", "pico"]]  # fmt: skip


def printed(home: Path, words: list[list[str]], to: str = "", **env: str) -> tuple[int, str, str]:
    """Code, stdout and stderr of commands in a process of their own."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LC_", "LANG"))}
    given |= {"EDGEVLM_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["sh", "-c", f'exec "$0" "$@" {to}', sys.executable, "-c", SCRIPT, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, env=given | env, check=False)
    encoding = "latin-1" if "8859" in str(env) else "ascii" if env else "utf-8"
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


def locales() -> list[str]:
    if shutil.which("locale") is None:
        return []
    known = subprocess.run(["locale", "-a"], capture_output=True, check=False)
    return known.stdout.decode("latin-1").lower().split()


NARROW = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1": {"PYTHONIOENCODING": "iso-8859-1"},
    "German": {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"},
}


@pytest.mark.skipif(os.name == "nt", reason="a shell")
@pytest.mark.parametrize("name", NARROW)
def test_every_command_in_a_narrow_encoding(name: str, tmp_path: Path) -> None:
    if name == "German" and not {"de_de.iso88591", "de_de.iso-8859-1"} & set(locales()):
        pytest.skip("no German locale in ISO-8859-1 on this machine")
    words = [[*command.split(), "--help"] for command in COMMANDS]
    code, out, err = printed(tmp_path, [*words, *SHOWN], **NARROW[name])
    assert (code, "Traceback" in err) == (0, False), err
    assert out.count("Usage: edgevlm") >= len(COMMANDS) and "pico" in out


@pytest.mark.skipif(os.name == "nt", reason="a shell")
def test_no_colours_where_none_are_wanted(tmp_path: Path) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    out = printed(tmp_path, SHOWN, FORCE_COLOR="1", NO_COLOR="1", PYTHONIOENCODING="ascii")[1]
    assert "pico" in out and not coloured.search(out)
    assert "\x1b" not in printed(tmp_path, SHOWN)[1]  # No terminal, nothing at all.


@pytest.mark.skipif(os.name == "nt", reason="a shell")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_stdout_is_closed(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", [*command.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        edgevlm.cli.main()
    assert ended.value.code == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell")
def test_commands_without_a_stdin(tmp_path: Path) -> None:
    code, out, err = printed(tmp_path, SHOWN, to="<&-")
    assert (code, "pico" in out, "Traceback" in err) == (0, True, False)


def test_doctor_checks_the_default_model(
    edge: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.store.default", lambda: "mine")
    _, out, _ = edge("doctor")
    assert "mine uses" in out and edge.loaded[-1][0] == "mine"
