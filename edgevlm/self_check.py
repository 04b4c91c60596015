"""A fixed picture and a fixed text, and a sketch of the numbers that an encoder makes of them.

The exporter keeps the sketches of its float32 graphs in the manifest; a machine compares its own
with them before it trusts a graph, since 8-bit kernels can be wrong on one processor alone, without
a word. Only numpy's arithmetic is used, none of its random numbers, which a release may change.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]

# Rows are summed up in so many groups, each with as many patterns of signs: 128 numbers.
GROUPS, PATTERNS = 16, 8
# A row of a dual encoder has groups of so many values at least: single ones change their signs.
_ROW_VALUES = 64

TEXT = "a photo of 2 red bicycles, a grey dog & three trees"


def picture(size: int) -> Float:
    """Pixels float32 [1, 3, size, size] in -1..1 with edges, slopes and noise, always the same."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    slopes = np.stack([x, y, 1 - (x + y) / 2])
    squares = ((x * 7).astype(int) + (y * 5).astype(int)) % 2
    noise = _bytes(3 * size * size).reshape(3, size, size) / 1275 - 0.1
    pixels = np.clip(slopes * 1.2 - 0.6 + squares * 0.5 - 0.25 + noise, -1, 1)
    return np.ascontiguousarray(pixels[None], np.float32)


def row_sketch(row: npt.NDArray[Any]) -> Float:
    """The sketch of a dual encoder's row, [1, d]."""
    return sketch(row.reshape(-1, 1), max(1, row.size // _ROW_VALUES))


def sketch(values: npt.NDArray[Any], groups: int = GROUPS) -> Float:
    """Sums of all values under fixed random signs, float32 [groups, PATTERNS], for rows [..., rows,
    width]: neighbouring rows are a group, at most so many and GROUPS of them.

    Angles between sketches are those between the values, to a third or so: every value has its
    part, so that one row, or one column of all rows, shows.
    """
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    parts = np.array_split(rows.ravel(), min(groups, GROUPS, len(rows)))
    bits = np.unpackbits(_bytes(-(-PATTERNS * rows.size // 8)))[: PATTERNS * rows.size]
    signs = bits.astype(np.int8).reshape(PATTERNS, -1) * 2 - 1
    ends = np.cumsum([len(part) for part in parts])[:-1]
    with np.errstate(all="ignore"):  # infinities are the caller's to find
        sums = [s @ part for s, part in zip(np.split(signs, ends, axis=1), parts, strict=True)]
    return np.stack(sums).astype(np.float32)


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The smallest cosine of any group of two sketches; -1 where one is not finite or they are of
    different shapes.
    """
    if np.size(a) != np.size(b) or not np.size(a) or np.size(a) % PATTERNS:
        return -1.0
    x, y = (np.asarray(v, np.float64).reshape(-1, PATTERNS) for v in (a, b))
    with np.errstate(all="ignore"):
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    cosines[(x == y).all(1)] = 1  # Sums of zeros have no angle.
    return float(np.nan_to_num(cosines, nan=-1.0).min())


def _bytes(n: int) -> npt.NDArray[np.uint8]:
    """Bytes that are the same everywhere and look random."""
    return np.frombuffer(hashlib.shake_256(b"edgevlm self-check").digest(n), np.uint8)
