"""Samples -> what a reader can rely on. Every sample is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Better = Literal["lower", "higher"]

# The notch of a box plot (McGill, Tukey, Larsen 1978): medians whose intervals of
# median +- 1.57 * IQR / sqrt(n) do not meet differ at about 95 % confidence.
_NOTCH = 1.57
_FEWEST = 3


@dataclass(frozen=True)
class Metric:
    """One measured quantity: its unit ("ms", "tok/s", "B", ...), which way is better, statistics
    of the samples (std with n - 1), and the samples in the order they were taken.
    """

    unit: str
    better: Better
    median: float
    min: float
    max: float
    p90: float
    p99: float
    std: float
    samples: tuple[float, ...]

    @property
    def noise(self) -> float | None:
        """Half the 95 % interval of the median, in `unit`; None for fewer than 3 samples."""
        if len(self.samples) < _FEWEST:
            return None
        low, high = np.percentile(self.samples, (25, 75))
        return float(_NOTCH * (high - low) / np.sqrt(len(self.samples)))

    @property
    def spread(self) -> float | None:
        """The noise as a part of the median; None where it is not known."""
        return None if self.noise is None or not self.median else self.noise / abs(self.median)


def metric(unit: str, better: Better, samples: Sequence[float]) -> Metric:
    """Summarizes samples; there must be at least one."""
    values = np.asarray(samples, np.float64)
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    return Metric(
        unit=unit,
        better=better,
        median=p50,
        min=float(values.min()),
        max=float(values.max()),
        p90=p90,
        p99=p99,
        std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        samples=tuple(float(v) for v in values),
    )
