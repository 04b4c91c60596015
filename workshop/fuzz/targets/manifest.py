"""edgevlm.json of a bundle: a changed one is refused, or the model answers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import edgevlm
from edgevlm.manifest import MANIFEST
from edgevlm.models import built_in
from workshop.fuzz.mutate import changed, dumped
from workshop.fuzz.samples import PICTURE


class Fuzzed:
    """Pico's bundle with another manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bundle"
        shutil.copytree(built_in(), self._folder, dirs_exist_ok=True)
        self._data = json.loads((built_in() / MANIFEST).read_text(encoding="utf-8"))

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        return dumped(changed(self._data, rng), rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        (self._folder / MANIFEST).write_bytes(data)
        with edgevlm.load(self._folder, cache=False) as vlm:
            vlm.ask("caption en", PICTURE, max_tokens=2)
