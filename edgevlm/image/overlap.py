"""Features of tiles that overlap -> what the projector reads: one map of all of them, beside the
overview's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgevlm.image.plan import plan
from edgevlm.image.planned import Plan
from edgevlm.specs import ImageSpec

Float = npt.NDArray[np.float32]


def for_projector(features: Float, size: tuple[int, int], spec: ImageSpec) -> Float:
    """The features float32 [tiles, patches, width] of a picture of this width and height, as the
    projector reads them: as they are or, of tiles that overlap, [1, patches, 2 * width].

    Every patch that several tiles saw is taken from the one that has it farther from its edge
    (moondream/torch/image_crops.py, reconstruct_from_crops); means of the map's neighbours make it
    as large as the overview (torch's adaptive_avg_pool2d).
    """
    if spec.tiles is None or spec.tiles.rule != "overlap":
        return features
    planned = plan(*size, spec)
    overview, pooled = features[0], features[-1]
    if planned.overview != "none":
        grid = _stitched(features[1:], planned, spec.tiles.margin)
        side = math.isqrt(spec.tokens)
        pooled = _pooled(grid, side).reshape(overview.shape)
    return np.concatenate([overview, pooled], -1)[None]


def _stitched(tiles: Float, planned: Plan, margin: int) -> Float:
    """[rows * columns, side * side, n] -> [height, width, n], without what tiles share."""
    (rows, columns), side = planned.grid, math.isqrt(tiles.shape[1])
    own = side - 2 * margin
    squares = tiles.reshape(rows, columns, side, side, -1)
    grid = np.empty(
        (rows * own + 2 * margin, columns * own + 2 * margin, tiles.shape[2]), np.float32
    )
    for y in range(rows):
        top, bottom = margin * (y > 0), side - margin * (y < rows - 1)
        for x in range(columns):
            left, right = margin * (x > 0), side - margin * (x < columns - 1)
            place = slice(y * own + top, y * own + bottom), slice(x * own + left, x * own + right)
            grid[place] = squares[y, x, top:bottom, left:right]
    return grid


def _pooled(grid: Float, side: int) -> Float:
    """A map [h, w, n] -> the means of its neighbours, [side, side, n]."""
    down, across = (_means(old, side) for old in grid.shape[:2])
    lines = np.tensordot(down, grid, 1)
    pooled: Float = np.einsum("xw,ywn->yxn", across, lines, optimize=True)
    return pooled


def _means(old: int, new: int) -> Float:
    """A matrix [new, old] that takes means: of the i-th place those from i * old / new, rounded
    down, to (i + 1) * old / new, rounded up.
    """
    matrix = np.zeros((new, old), np.float32)
    for i in range(new):
        first, end = i * old // new, -(-(i + 1) * old // new)
        matrix[i, first:end] = 1 / (end - first)
    return matrix
