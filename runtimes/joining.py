"""Image embeddings of a picture's tiles -> those of the picture, as its plan has them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleCorrupt
from edgevlm.image.planned import Plan
from edgevlm.manifest import MANIFEST
from edgevlm.runtimes.engines import Float


def read_newline(bundle: Bundle) -> Float | None:
    """The bundle's newline float32 [n_embd] or, with the row between a picture's tiles and its
    overview behind it, [2, n_embd]; None for a model that has none.

    Raises BundleCorrupt where the file is missing or holds anything else.
    """
    tiles = bundle.manifest.image.tiles
    if tiles is None or tiles.map is None:
        return None
    if (path := bundle.newline) is None:
        raise BundleCorrupt(bundle.folder / MANIFEST, "names no newline, which its tiles need")
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise BundleCorrupt(path, f"cannot be read ({e})") from None
    n_embd = bundle.manifest.decoder.n_embd
    shape = (2, n_embd) if tiles.map.separated else (n_embd,)
    if not isinstance(found, np.ndarray) or (found.dtype, found.shape) != (np.float32, shape):
        numbers = " times ".join(map(str, shape))
        raise BundleCorrupt(path, f"does not hold {numbers} numbers in float32")
    if not np.isfinite(found).all():
        raise BundleCorrupt(path, "holds what is not a number")
    newline: Float = found
    return newline


def join(tiles: Float, plan: Plan, newline: Float | None) -> Float:
    """Tiles float32 [tiles, tokens, n_embd] -> rows float32 [plan.rows, n_embd].

    With a newline the tiles of a grid are one map, of which the plan says what is kept.
    """
    if newline is None:
        return np.concatenate(tiles)
    if newline.ndim > 1:
        return _separated(tiles, plan, newline)
    if plan.kept is None:
        return np.concatenate([*tiles, newline[None]])
    parts = list(tiles)
    at = {"none": None, "first": 0, "last": -1}[plan.overview]
    overview = [] if at is None else [parts.pop(at)]
    left, top, right, bottom = plan.kept
    grid = _stitched(np.stack(parts), plan.grid)[top:bottom, left:right]
    if plan.shrunk:
        grid = _resized(grid, plan.shrunk)
    lines = _lines(grid, newline)
    return np.concatenate([*overview, lines] if plan.overview == "first" else [lines, *overview])


def _separated(tiles: Float, plan: Plan, ends: Float) -> Float:
    """The lines of the grid, a row of its own, and the lines of the overview, which the one tile of
    a grid is itself.
    """
    newline, separator = ends
    parts = tiles if plan.overview == "none" else tiles[1:]
    grid, overview = _stitched(parts, plan.grid), _stitched(tiles[:1], (1, 1))
    return np.concatenate([_lines(grid, newline), separator[None], _lines(overview, newline)])


def _lines(grid: Float, newline: Float) -> Float:
    """A map [h, w, n] -> its lines [h * (w + 1), n], the newline behind each."""
    ends = np.broadcast_to(newline, (len(grid), 1, len(newline)))
    return np.concatenate([grid, ends], 1).reshape(-1, len(newline))


def _stitched(tiles: Float, grid: tuple[int, int]) -> Float:
    """[rows * columns, side * side, n] -> [rows * side, columns * side, n]."""
    rows, columns = grid
    side, width = math.isqrt(tiles.shape[1]), tiles.shape[2]
    apart = tiles.reshape(rows, columns, side, side, width).transpose(0, 2, 1, 3, 4)
    return apart.reshape(rows * side, columns * side, width)


def _resized(grid: Float, size: tuple[int, int]) -> Float:
    """A map [h, w, n] -> [height, width, n], bilinear between the centres of four neighbours as
    torch's interpolate (no antialias, align_corners off).
    """
    width, height = size
    above, below, y = _between(len(grid), height)
    left, right, x = _between(grid.shape[1], width)
    y, x = y[:, None, None], x[:, None]
    lines = grid[above] + (grid[below] - grid[above]) * y
    resized: Float = lines[:, left] + (lines[:, right] - lines[:, left]) * x
    return resized


def _between(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Float]:
    """The two neighbours of every new place among the old ones, and the second one's weight."""
    places = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = places.astype(np.intp)
    return first, np.minimum(first + 1, old - 1), (places - first).astype(np.float32)
