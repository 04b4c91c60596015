"""Targets by name: each module here has a class Fuzzed, made with a folder of its own."""

from __future__ import annotations

import importlib
import pkgutil
import random
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """Something that edgevlm reads."""

    def case(self, rng: random.Random) -> bytes:
        """An input."""

    def check(self, data: bytes) -> None:
        """Gives an input to edgevlm; raises its errors, and Wrong for a wrong result."""


def names() -> list[str]:
    """All targets, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(name: str, folder: Path) -> Target:
    """A target; it may write into `folder`."""
    target: Target = importlib.import_module(f"{__name__}.{name}").Fuzzed(folder)
    return target
