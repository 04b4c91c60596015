"""How a child process of this Python is started, so that it runs the edgevlm that runs here."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from typing import TypedDict


class Setting(TypedDict):
    """The part of subprocess's arguments that every child shares."""

    env: dict[str, str]
    cwd: str


def command(module: str, *arguments: str | os.PathLike[str]) -> list[str]:
    """`python -m module arguments`; paths become absolute, since the child has another folder."""
    given = [os.path.abspath(a) if isinstance(a, os.PathLike) else a for a in arguments]
    return [sys.executable, "-m", module, *given]


def setting() -> Setting:
    """This process's import path, and a folder in which nothing shadows a module.

    Python puts the current folder before all others when it runs a module.
    """
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    return {"env": os.environ | {"PYTHONPATH": path}, "cwd": _empty().name}


@functools.cache
def _empty() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgevlm-")
