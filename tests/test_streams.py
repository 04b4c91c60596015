"""Standard streams that are full, closed, broken or narrow: a line and an exit code, no traceback.

Each case is a process of its own: what Python says when it ends is part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.bundle import Bundle

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a shell and /dev/full")

ROOT = Path(__file__).parent.parent
SHAPES = str(ROOT / "examples" / "shapes.png")
ASK = ("ask", "caption en", "-m", "pico", "-i", SHAPES)
ANSWER = "a red circle, a blue square, a yellow triangle and a green star\n"


def run(
    *arguments: str | bytes, to: str = "", env: dict[str, str] | None = None, stdin: bytes = b""
) -> tuple[int, bytes, str]:
    """Runs the command line with the shell's redirections `to`."""
    command = ["sh", "-c", f'exec "$0" -m edgevlm "$@" {to}', sys.executable, *arguments]
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LC_"))}
    done = subprocess.run(
        command, capture_output=True, input=stdin, cwd=ROOT, env=given | (env or {}), check=False
    )
    errors = done.stderr.decode(errors="replace")
    assert "Traceback" not in errors and "Exception ignored" not in errors
    return done.returncode, done.stdout, errors


WRITING = {
    "answer": ASK,
    "json": (*ASK, "--json"),
    "detect": ("detect", "circle", "-m", "pico", "-i", SHAPES),
    "table": ("models", "list"),
    "doctor": ("doctor",),
    "help": ("--help",),
    "help of a command": ("export", "--help"),
    "version": ("--version",),
}


@pytest.mark.fault("Command line", "stdout is on a disk that is full", "one line, exit code 1")
@pytest.mark.parametrize(
    ("name", "unbuffered"), [*((name, "") for name in WRITING), ("table", "1"), ("answer", "1")]
)
def test_a_full_stdout(name: str, unbuffered: str) -> None:
    env = {"PYTHONUNBUFFERED": unbuffered}
    code, _, errors = run(*WRITING[name], to="> /dev/full", env=env)
    assert code == 1
    assert errors.splitlines()[-1] == (
        "edgevlm: stdout: cannot be written (No space left on device)"
    )


@pytest.mark.fault("Command line", "stdout is closed", "one line, exit code 1")
@pytest.mark.parametrize("name", WRITING)
def test_a_closed_stdout(name: str) -> None:
    code, _, errors = run(*WRITING[name], to=">&-")
    assert code == 1
    assert errors.splitlines()[-1] == "edgevlm: stdout: is closed"


@pytest.mark.fault("Command line", "a chat's stdout fills up", "the chat ends with one line")
def test_a_full_stdout_ends_a_chat() -> None:
    code, _, errors = run("chat", "-m", "pico", "-i", SHAPES, to="> /dev/full", stdin=b"what?\n")
    assert code == 1 and "stdout: cannot be written" in errors.splitlines()[-1]


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-"])
def test_notes_that_nobody_can_read_do_not_end_the_work(to: str) -> None:
    assert run(*ASK[:2], *ASK[4:], "--stats", to=to) == (0, ANSWER.encode(), "")
    assert run("ask", "x", "-i", "nothing.png", to=to) == (1, b"", "")
    assert run("fly", to=to) == (2, b"", "")


def test_an_export_whose_progress_nobody_can_see(paligemma_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ("requantize", str(paligemma_bundle.folder), "--quant", "f16", "--no-verify")
    for to in ("2> /dev/full", "2>&-", "<&- >&- 2>&-"):
        assert run(*arguments, str(tmp_path / to.replace("/", "")), to=to)[0] == 0


def test_nothing_is_open_at_all() -> None:
    assert run(*ASK, to="<&- >&- 2>&-")[0] == 1
    assert run("--version", to="<&- >&- 2>&-")[0] == 1


@pytest.mark.fault(
    "Command line",
    "stdin is closed where words or a picture should come from it",
    "one line, exit code 1",
)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("ask", "x", "-m", "pico", "-i", "-"), "stdin: is closed; pipe a picture into the"),
        (("caption", "-m", "pico", "-i", "-"), "stdin: is closed; pipe a picture into the"),
        (("chat", "-m", "pico"), "stdin is closed; a chat reads its questions there"),
    ],
)
def test_a_closed_stdin(arguments: tuple[str, ...], line: str) -> None:
    code, out, errors = run(*arguments, to="<&-")
    assert (code, out) == (1, b"")
    assert errors.startswith(f"edgevlm: {line}") and errors.count("\n") == 1


def test_who_needs_no_stdin_does_without() -> None:
    assert run(*ASK, to="<&-") == (0, ANSWER.encode(), "")


@pytest.mark.parametrize("name", ["answer", "table", "help"])
def test_a_reader_that_went_away(name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgevlm", *WRITING[name]]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


# A table, a codec of C's, one that would rather fail, and one that lacks nothing.
ENCODINGS = ["cp1252", "ascii", "cp1252:strict", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_answer_that_the_encoding_lacks(encoding: str, random_words: Path) -> None:
    env = {"PYTHONIOENCODING": encoding}
    arguments = ("-m", str(random_words), "-i", SHAPES, "--max-tokens", "60")
    code, out, errors = run("ask", "x", *arguments, env=env)
    assert code == 0 and len(out) > 60
    assert errors == "Cut at 60 tokens; --max-tokens raises the limit.\n"
    assert run("chat", *arguments, env=env, stdin=b"x\n")[1] == out
    assert run("ask", "x", *arguments, "--json", env=env)[0] == 0


@pytest.fixture(scope="module")
def random_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that answers in every script; its name is in none of the narrow encodings."""
    from edgevlm.export import export_bundle
    from tests.checkpoints.llava import write_llava

    folder = tmp_path_factory.mktemp("words")
    source = write_llava(folder / "source", layout="hf", projector="mlp2x_gelu")
    return export_bundle(source, folder / "日本語", quant="f32", verify=False).folder


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_that_the_encoding_lacks(encoding: str, random_words: Path) -> None:
    env = {"PYTHONIOENCODING": encoding, "EDGEVLM_HOME": "/nowhere/日本語"}
    code, out, _ = run("models", "show", str(random_words), env=env)
    assert code == 0 and b"llava" in out
    assert run("models", "list", env=env)[0] == 0
    code, _, errors = run("ask", "x", "-m", "日本語", env=env)
    assert code == 1 and errors.count("\n") == 1 and "no such bundle folder" in errors


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("ask", b"caf\xe9", "-m", "pico"), 1, "not valid text"),
        (("ask", "x", "-m", "pico", "-i", b"caf\xe9.png"), 1, "no such file"),
        (("models", "show", b"caf\xe9"), 1, "no such bundle folder"),
        (("ask", "x", "--seed", b"caf\xe9"), 2, "not a valid integer"),
        ((b"caf\xe9",), 2, "No such command"),
        (("export", b"caf\xe9", "out"), 1, "caf"),
    ],
)
def test_arguments_that_are_not_text(
    encoding: str, arguments: tuple[str | bytes, ...], code: int, problem: str
) -> None:
    found, out, errors = run(*arguments, env={"PYTHONIOENCODING": encoding})
    assert (found, out) == (code, b"")
    assert errors.count("\n") == 1 and problem in errors


def test_help_in_a_narrow_encoding() -> None:
    for arguments in (["--help"], ["export", "--help"], ["bench", "run", "--help"]):
        assert run(*arguments, env={"PYTHONIOENCODING": "ascii"})[0] == 0
