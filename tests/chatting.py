"""`edgevlm chat` as a user runs it: on lines from a pipe, or in a terminal of its own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest

import edgevlm
from edgevlm import cli
from edgevlm.runtimes.session import VLM


def piped(
    vlm: VLM | None, lines: Sequence[str], capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[str, list[str]]:
    """The answers and the notes of a chat with a model, None for the built-in one."""
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{s}\n" for s in lines).encode()), "utf-8")
    load: Callable[..., VLM] = (lambda *_, **__: vlm) if vlm else edgevlm.load
    with (
        mock.patch.object(sys, "stdin", stdin),
        mock.patch.object(
            sys, "argv", ["edgevlm", "chat", "-m", "mine" if vlm else "pico", *options]
        ),
        mock.patch.object(edgevlm, "load", load),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out, err.splitlines()


PROGRAM = """
import sys
import edgevlm
from edgevlm import cli
from edgevlm.runtimes import fakes
answers = {answers!r}
edgevlm.load = lambda *_, **__: fakes.vlm(answers, conversational=True, later_pictures=True)
sys.argv = {argv!r}
cli.main()
"""


def in_terminal(
    folder: Path,
    typed: Sequence[tuple[str, str]],
    *,
    answers: Sequence[str] = ("one",),
    argv: Sequence[str] = ("chat", "-m", "mine"),
    columns: int = 80,
    environ: Mapping[str, str] | None = None,
) -> str:
    """All that a program writes to a terminal of its own: each text is typed once the other is on
    the screen. The terminal understands half blocks and no pictures.
    """
    import fcntl
    import pty
    import struct
    import termios

    kept = {
        k: v
        for k, v in os.environ.items()
        if k in ("PATH", "HOME", "SYSTEMROOT", "LD_LIBRARY_PATH")
    }
    given = {
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "EDGEVLM_HOME": str(folder / "home"),
        **(environ or {}),
    }
    code = PROGRAM.format(answers=[*answers], argv=["edgevlm", *argv])
    pid, fd = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-c", code], kept | given)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen, at = b"", 0
    for awaited, text in (*typed, ("", "")):
        while awaited.encode() not in seen[at:]:
            seen += (read := _read(fd))
            assert read, f"{awaited!r} did not come: {seen[at:]!r}"
        at = seen.index(awaited.encode(), at) + len(awaited.encode()) if awaited else at
        os.write(fd, text.encode())
    while read := _read(fd):
        seen += read
    os.waitpid(pid, 0)
    os.close(fd)
    return seen.decode(errors="replace")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:  # The program has ended.
        return b""
