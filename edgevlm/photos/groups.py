"""Rows that are nearly the same, in groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Rows that are compared with all others at once: products of 100,000 pictures take 100 MB.
_AT_ONCE = 256


def groups(
    rows: npt.NDArray[np.float32], threshold: float, advance: Callable[[int], None]
) -> list[list[int]]:
    """The numbers of unit rows [n, d] that are linked by cosines of at least `threshold`, groups of
    two and more, the largest first; `advance` is told of rows that are done.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        near = some @ rows[start:].T >= threshold
        for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
            a, b = root(start + int(i)), root(start + int(j))
            parent[max(a, b)] = min(a, b)
        advance(len(some))
    found = defaultdict[int, list[int]](list)
    for i in range(len(rows)):
        found[root(i)].append(i)
    several = [group for group in found.values() if len(group) > 1]
    return sorted(several, key=lambda group: (-len(group), group[0]))
