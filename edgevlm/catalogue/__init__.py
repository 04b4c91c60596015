"""The catalogue: published models that go by a short name, one file of data for each family.

Sizes are bytes: `download` is what an export reads of the repository, `bundle` what the laptop
target makes of the model's shapes, `memory` 1.05 times that, the KV cache of 2048 tokens and
0.3 GB. A revision is the commit at which the facts were taken; None follows the main branch.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgevlm import schema

_FOLDER = Path(__file__).parent
_SUGGESTIONS = 3


@dataclass(frozen=True)
class CatalogueEntry:
    """A published model: where it is, what it costs and what it can do.

    `languages` are ISO codes as its card names them, `tasks` edgevlm's commands that it was trained
    for, `context` tokens, `tiles` the most that a picture is cut into, 0 where it keeps its size.
    """

    name: str
    family: str
    repo: str
    revision: str | None
    license: str
    gated: bool
    parameters: int
    download: int
    bundle: int
    memory: int
    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    context: int
    tiles: int = 1

    @property
    def source(self) -> str:
        """The source as `edgevlm export` takes it: `org/name[@revision]`."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@functools.cache
def entries() -> dict[str, CatalogueEntry]:
    """All models of the catalogue by name, the families and their models in the files' order.

    >>> entries()["smolvlm-256m"].repo
    'HuggingFaceTB/SmolVLM-256M-Instruct'
    """
    found = {}
    for path in sorted(_FOLDER.glob("*.json")):
        for name, facts in json.loads(path.read_text(encoding="utf-8")).items():
            found[name] = schema.read(CatalogueEntry, {"name": name, "family": path.stem, **facts})
    return found


def entry(name: str) -> CatalogueEntry | None:
    """The model of a name or of a repository on the hub; None for one that is not here."""
    known = entries()
    return known.get(name.lower()) or next((e for e in known.values() if e.repo == name), None)


def near(name: str, known: Iterable[str]) -> list[str]:
    """Names that are nearly this one, the nearest first.

    >>> near("smolvm-256m", ["pico", "smolvlm-256m"])
    ['smolvlm-256m']
    """
    return difflib.get_close_matches(name.lower(), list(known), _SUGGESTIONS)
