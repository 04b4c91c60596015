"""The first use of a provider: its features and its speed beside the CPU's, kept on disk.

Providers for NPUs and GPUs compute wrong features without a word more often than they fail; one
picture through both takes seconds once, and every later start reads the numbers.
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

import numpy as np

from edgevlm import schema
from edgevlm.runtimes.engines import Float, VisionEncoder

# What the exporter allows 8-bit quantization to move any feature by (its VisionPrecision): a device
# that moves one further than that is no longer this model.
BOUND = 0.99
# Enough for one that nothing else disturbs.
_RUNS = 3


@dataclass(frozen=True)
class Verdict:
    """Result of a first use: the worst cosine of a row, and milliseconds for a picture.

    `cpu_ms` is the CPU's time at the precision that it runs best; what follows says what all this
    was found for.
    """

    cosine: float
    encode_ms: float
    cpu_ms: float
    files: tuple[str, ...]
    provider: str
    version: str
    hardware: str

    @property
    def sound(self) -> bool:
        """True if the device may be used."""
        return self.cosine >= BOUND


def compare(encoder: VisionEncoder, cpu: VisionEncoder, size: int) -> float:
    """The worst cosine of any row, of features or of embeddings, on a fixed picture.

    `size` is the picture's side in pixels. Rows that are not finite count as -1.
    """
    pixels = picture(size)
    mine, right = encoder.features(pixels), cpu.features(pixels)
    # The CPU's features go through both projectors, so that each graph is judged alone.
    rows = encoder.project(right), cpu.project(right)
    return min(worst_cosine(mine, right), worst_cosine(*rows))


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


def picture(size: int) -> Float:
    """Pixels float32 [1, 3, size, size] in -1..1 with edges, slopes and noise, always the same."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    slopes = np.stack([x, y, 1 - (x + y) / 2])
    squares = ((x * 7).astype(int) + (y * 5).astype(int)) % 2
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (3, size, size))
    pixels = np.clip(slopes * 1.2 - 0.6 + squares * 0.5 - 0.25 + noise, -1, 1)
    return np.ascontiguousarray(pixels[None], np.float32)


def worst_cosine(a: Float, b: Float) -> float:
    """The smallest cosine of any two rows of the same place; -1 where one is not finite."""
    x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (a, b))
    with np.errstate(all="ignore"):
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    cosines[(x == y).all(1)] = 1  # Rows of zeros have no angle.
    return float(np.nan_to_num(cosines, nan=-1.0).min())


class Verdicts:
    """Verdicts by what they were found for, one small JSON file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, key: str) -> Verdict | None:
        """The verdict for this key, or None; a damaged file counts as none."""
        try:
            data: Any = json.loads(self._path(key).read_text(encoding="utf-8"))
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
