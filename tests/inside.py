"""Programs that are run in this process, which has imported what they need already."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any
from unittest import mock

from edgevlm import cli
from edgevlm.export import child as children_of_exports
from edgevlm.export.gguf import tools


def called(
    action: Callable[[], object], arguments: Sequence[str] = (), input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Calls `action` as the program of a child process with these arguments; its exit code and
    what it wrote.
    """
    stdin = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["program", *arguments]))
        stack.enter_context(mock.patch.object(sys, "stdin", stdin))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = _code(action)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def edgevlm(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return called(cli.main, arguments, input)


@contextmanager
def children() -> Iterator[None]:
    """In the block, programs that exports run in child processes are run in this process."""
    with (
        mock.patch.object(children_of_exports, "run", child),
        mock.patch.object(tools, "process", _process),
    ):
        yield


@contextmanager
def _process(command: Sequence[str], *, stderr: IO[bytes], **_: Any) -> Iterator[mock.Mock]:
    """Runs llama.cpp's quantizer, in place of `edgevlm.cleanup.process`; it has ended when the
    block begins.
    """
    done = child(command)
    stderr.write(done.stderr.encode())
    yield mock.Mock(returncode=done.returncode, poll=lambda: done.returncode)


def child(
    command: Sequence[str], *, input: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command of `edgevlm.export.child.command`, in place of `edgevlm.export.child.run`."""
    _, _, _, _, module, *arguments = command

    def program() -> None:
        # Python warns of a module that is run after it was imported.
        imported = sys.modules.pop(module, None)
        try:
            runpy.run_module(module, run_name="__main__")
        finally:
            if imported:
                sys.modules[module] = imported

    return called(program, arguments, input or "")


def _code(action: Callable[[], object]) -> int:
    """The exit code, as Python's own end makes it."""
    try:
        action()
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
