"""Child processes of this Python that run the edgevlm that runs here, and end when it ends."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm import cleanup
from edgevlm.errors import ExportError

# `python -m MODULE` without the current folder on the import path, where anything could shadow a
# module; Python calls that folder "".
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from edgevlm.export.child import main; main(*sys.argv[1:3])"
)
# Linux's prctl(PR_SET_PDEATHSIG, signal).
_PARENT_DEATH_SIGNAL = 1


def command(module: str, *arguments: str | os.PathLike[str]) -> list[str]:
    """The command that runs a module as a program; paths become absolute."""
    given = [os.path.abspath(a) if isinstance(a, os.PathLike) else a for a in arguments]
    return [sys.executable, "-c", _START, str(os.getpid()), module, *given]


def main(parent: str, module: str) -> None:
    """Runs a module in this process, a child that ends with its parent where the system helps."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != int(parent):
            return
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def environment() -> dict[str, str]:
    """This process's variables and import path."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    return os.environ | {"PYTHONPATH": path}


def run(
    command: list[str],
    *,
    input: str | None = None,
    timeout: float | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in `environment()` where `env` names no other; all text is UTF-8.

    Raises subprocess.TimeoutExpired, after the command was ended.
    """
    with cleanup.process(
        command,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment() if env is None else env,
    ) as process:
        out, err = process.communicate(input, timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def arrays(module: str, folder: Path, given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The arrays that a module of the runtime writes, run as `MODULE FOLDER IN.npz OUT.npz` with
    the arrays `given`; `what` it is for stands before its last words in the ExportError.
    """
    import numpy as np

    with cleanup.temporary_folder() as scratch:
        source, target = scratch / "in.npz", scratch / "out.npz"
        np.savez(source, **given)
        done = run(command(module, folder, source, target))
        if done.returncode or not target.exists():
            lines = done.stderr.strip().splitlines()
            raise ExportError(f"{what} does not answer ({(lines or ['no reason'])[-1]})")
        with np.load(target) as found:
            return {name: found[name] for name in found.files}
