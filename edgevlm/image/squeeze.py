"""Pixels of a grid of tiles squeezed into one tile, bicubic without a filter, as torch does it.

Every `factor`-th pixel, or what is in the middle of four where that lies between two: such a
picture is as rough as a photo seen through a sieve, and some models were trained on them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float32]

# Keys' cubic with torch's a = -0.75, half-way between two of four neighbours; exact in float32.
_OUTER, _INNER = np.float32(-0.09375), np.float32(0.59375)


def squeezed(canvas: Pixels, rows: int, columns: int) -> Pixels:
    """Pixels float32 [3, rows * n, columns * n] -> [3, n, n], to the bit as torch's
    `interpolate(mode="bicubic")` on processors with fused multiply-add; without it torch's last bit
    may differ.
    """
    return _squeezed(_squeezed(canvas, columns).swapaxes(1, 2), rows).swapaxes(1, 2)


def _squeezed(lines: Pixels, factor: int) -> Pixels:
    """The last axis, a `factor`-th as long."""
    if factor % 2:
        return lines[..., factor // 2 :: factor]
    n = lines.shape[-1]
    middle = np.arange(factor // 2 - 1, n, factor)
    a, b, c, d = (lines[..., np.clip(middle + step, 0, n - 1)] for step in (-1, 0, 1, 2))
    sums = _fused(a, _OUTER, b * _INNER)
    return _fused(d, _OUTER, _fused(c, _INNER, sums))


def _fused(values: Pixels, weight: np.float32, more: Pixels) -> Pixels:
    """values * weight + more, rounded once: the product of two float32 is whole in float64."""
    return (values.astype(np.float64) * np.float64(weight) + more).astype(np.float32)
