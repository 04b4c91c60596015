"""The first use of an encoder on a machine: its numbers beside the right ones, kept on disk.

Providers for NPUs and GPUs compute wrong features without a word more often than they fail, and so
do 8-bit kernels on a processor that they were not tried on. One picture takes a moment once, and
every later start reads what was found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm import schema
from edgevlm.image.overlap import for_projector
from edgevlm.image.plan import checked_side
from edgevlm.runtimes.engines import VisionEncoder
from edgevlm.self_check import cosine, picture, row_sketch, sketch
from edgevlm.specs import ImageSpec, SelfCheck

# For encoders that the bundle has no numbers for: what the exporter allows 8-bit quantization.
TOLERANCE = 0.01
# Enough for one that nothing else disturbs.
_RUNS = 3


@dataclass(frozen=True)
class Verdict:
    """Result of a first use: how near the numbers are, and how near they have to be.

    `encode_ms` are milliseconds for a picture and `cpu_ms` those of the CPU at the precision that
    it runs best, both 0 on the CPU itself; what follows says what all this was found for.
    """

    cosine: float
    least: float
    encode_ms: float
    cpu_ms: float
    files: tuple[str, ...]
    provider: str
    version: str
    hardware: str

    @property
    def sound(self) -> bool:
        """True if the encoder may be used."""
        return self.cosine >= self.least


def numbers(encoder: VisionEncoder, image: ImageSpec, *, projects: bool = True) -> SelfCheck:
    """An encoder's sketches of the fixed picture, of a dual encoder's row where there is no
    projector.
    """
    side = checked_side(image)
    features = encoder.features(picture(side))
    if not projects:
        return SelfCheck(tuple(row_sketch(features).ravel()), (), {})
    rows = sketch(encoder.project(for_projector(features, (side, side), image))).ravel()
    return SelfCheck(tuple(sketch(features).ravel()), tuple(rows), {})


def nearness(mine: SelfCheck, right: SelfCheck) -> float:
    """The smallest cosine, of features or of embeddings; -1 where one is not finite."""
    found = cosine(mine.features, right.features)
    if mine.embeddings or right.embeddings:
        found = min(found, cosine(mine.embeddings, right.embeddings))
    return found


def encode_ms(encoder: VisionEncoder, size: int) -> float:
    """The fastest of a few runs of the fixed picture, after one that warms up."""
    pixels = picture(size)
    encoder.features(pixels)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        encoder.features(pixels)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


class Verdicts:
    """Verdicts by what they were found for, one small JSON file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, key: str) -> Verdict | None:
        """The verdict for this key, or None; a damaged file counts as none."""
        try:
            data: Any = schema.parsed(self._path(key).read_text(encoding="utf-8"))
            return schema.read(Verdict, data)
        except (OSError, ValueError, schema.SchemaError):
            return None

    def remember(self, key: str, verdict: Verdict) -> None:
        """Keeps what was found; without a place to write it is found again next time."""
        path = self._path(key)
        text = json.dumps(dataclasses.asdict(verdict), indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all, whoever else writes.
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            return

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def key(*facts: str) -> str:
    """A file name for these facts."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
