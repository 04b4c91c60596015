"""JSON files of tiny checkpoints of every family and of models that embed: each is exported, or
the checkpoint is refused.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from edgevlm.export import export_bundle
from tests import inside
from tests.checkpoints.dual import write_clip, write_siglip
from tests.test_families import CHECKPOINTS
from workshop.fuzz.mutate import changed, dumped

# A vocabulary or an index of weights is the business of other targets, and larger than all others.
_MOST_BYTES = 20_000


class Fuzzed:
    """Checkpoints of all families, one JSON file of which is changed."""

    def __init__(self, folder: Path) -> None:
        self._kept, self._folders, self._out = (
            folder / name for name in ("kept", "changed", "out")
        )
        if not self._kept.exists():
            for name, (_, write) in CHECKPOINTS.items():
                write(self._kept / name)
            write_clip(self._kept / "clip")
            write_siglip(self._kept / "siglip")
        # A process that an input ended left it there.
        shutil.rmtree(self._folders, ignore_errors=True)
        shutil.copytree(self._kept, self._folders)
        self._files = [
            path.relative_to(self._kept)
            for path in sorted(self._kept.rglob("*.json"))
            if path.stat().st_size <= _MOST_BYTES
        ]

    def case(self, rng: random.Random) -> bytes:
        """See Target; the first two bytes say which file."""
        which = rng.randrange(len(self._files))
        value = json.loads((self._kept / self._files[which]).read_bytes())
        return which.to_bytes(2, "big") + dumped(changed(value, rng), rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        file = self._files[int.from_bytes(data[:2], "big") % len(self._files)]
        path = self._folders / file
        try:
            path.write_bytes(data[2:])
            source = self._folders / file.parts[0]
            with inside.children():
                export_bundle(source, self._out, quant="f32", vision_precision="fp32", verify=False)
        finally:
            shutil.copy(self._kept / file, path)
