"""Rules by which pictures are cut into tiles, each an original's.

A rule yields the plans of a picture, the finest first and one of a single tile last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from edgevlm.errors import ImageError
from edgevlm.image.planned import Plan
from edgevlm.image.whole import single
from edgevlm.specs import ImageSpec, MapSpec, TileRule, TileSpec

# Idefics3's processor resizes no picture beyond this side (MAX_IMAGE_SIZE).
_IDEFICS3_SIDE = 4096
# Gemma3Processor's defaults (transformers 4.57), whatever a processor's file says: how long a
# picture is cut, and the least side of a part in pixels.
_PAN_RATIO, _PAN_SIDE = 1.2, 256
# A map is resized where its sides are longer than this times what it may have.
_SHRINK_ABOVE = 1.1


def _longest_edge(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """Idefics3's rule (transformers 4.57, Idefics3ImageProcessor), ever coarser, whole at last."""
    size = spec.size
    for edge in range(tiles.longest_edge, 0, -size) if tiles.split else ():
        resized = _to_longest(width, height, edge)
        # As the original computes them: a ratio in floating point, cut off.
        ratio = resized[0] / resized[1]
        if ratio >= 1:
            wide = _up(resized[0], size)
            canvas = (wide, _up(int(wide / ratio), size))
        else:
            tall = _up(resized[1], size)
            canvas = (_up(int(tall * ratio), size), tall)
        columns, rows = canvas[0] // size, canvas[1] // size
        if columns * rows > 1:
            yield _cut(canvas, rows, columns, spec, tiles, resized)
        elif edge == tiles.longest_edge:
            yield Plan(canvas, ((0, 0, size, size),), spec.tokens, resized)
    whole = _to_longest(width, height, tiles.longest_edge)
    yield Plan((size, size), ((0, 0, size, size),), spec.tokens, whole)


def _ratio(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """InternVL's rule (internvl/train/dataset.py, dynamic_preprocess; transformers 4.57,
    get_optimal_tiled_canvas), of ever fewer tiles, whole at last.
    """
    whole = Plan((spec.size, spec.size), ((0, 0, spec.size, spec.size),), spec.tokens)
    for most in range(tiles.most, tiles.least - 1, -1) if tiles.split else ():
        columns, rows = _nearest(width, height, spec.size, _grids(tiles.least, most))
        if columns * rows == 1:
            break
        yield _cut((columns * spec.size, rows * spec.size), rows, columns, spec, tiles)
    yield whole


@lru_cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of all grids of so many tiles, the smallest first."""
    sides = range(1, most + 1)
    found = [(x, y) for x in sides for y in range(1, most // x + 1) if x * y >= least]
    return tuple(sorted(found, key=math.prod))


def _nearest(
    width: int, height: int, size: int, grids: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The grid of the picture's shape; of two that are as near the larger one, if the picture has
    more than half as many pixels.
    """
    best, least = (1, 1), math.inf
    for columns, rows in grids:
        # In floating point, where the originals find two equal or not.
        off = abs(width / height - columns / rows)
        if off < least or (off == least and width * height > 0.5 * size * size * columns * rows):
            best, least = (columns, rows), off
    return best


def _to_longest(width: int, height: int, edge: int) -> tuple[int, int]:
    """The size with the long side at `edge`, the short one even."""
    ratio = width / height
    if width >= height:
        short = int(edge / ratio)
        width, height = edge, max(short + short % 2, 1)
    else:
        short = int(edge * ratio)
        width, height = max(short + short % 2, 1), edge
    ratio = width / height
    if width >= height and width > _IDEFICS3_SIDE:
        return _IDEFICS3_SIDE, max(int(_IDEFICS3_SIDE / ratio), 1)
    if height > width and height > _IDEFICS3_SIDE:
        return max(int(_IDEFICS3_SIDE * ratio), 1), _IDEFICS3_SIDE
    return width, height


def _pan_and_scan(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """Gemma 3's rule (transformers 4.57, Gemma3ImageProcessor.pan_and_scan), of ever fewer parts,
    whole at last.
    """
    long, short = max(width, height), min(width, height)
    ratio = long / short
    for most in range(tiles.most, 1, -1) if ratio >= _PAN_RATIO else ():
        n = min(most, max(2, min(long // _PAN_SIDE, math.floor(ratio + 0.5))))
        side = math.ceil(long / n)
        if min(side, short) < _PAN_SIDE:
            break
        edges = [*range(0, long, side), long]
        boxes = tuple(
            (a, 0, b, height) if width >= height else (0, a, width, b) for a, b in pairwise(edges)
        )
        grid = (1, n) if width >= height else (n, 1)
        rows = (n + 1) * spec.tokens
        yield Plan((width, height), boxes, rows, grid=grid, overview=tiles.overview)
    yield Plan((spec.size, spec.size), ((0, 0, spec.size, spec.size),), spec.tokens)


def _overlap(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """Moondream2's rule (moondream/torch/image_crops.py, overlap_crop_image), of ever fewer tiles,
    whole at last.
    """
    size, margin = spec.size, tiles.margin * patch_side(spec)
    window = size - 2 * margin
    for most in range(tiles.most, 0, -1) if tiles.split else ():
        rows, columns = _covering(height - 2 * margin, width - 2 * margin, window, most)
        if rows * columns == 1:
            break
        boxes = tuple(
            (x * window, y * window, x * window + size, y * window + size)
            for y in range(rows)
            for x in range(columns)
        )
        canvas = (columns * window + 2 * margin, rows * window + 2 * margin)
        yield Plan(canvas, boxes, spec.tokens, grid=(rows, columns), overview=tiles.overview)
    yield Plan((size, size), ((0, 0, size, size),), spec.tokens)


def _covering(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """Rows and columns of windows that cover an area (select_tiling)."""
    if min(height, width) <= window:
        return 1, 1
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    if rows * columns > most:
        share = math.sqrt(most / (rows * columns))
        return max(1, math.floor(rows * share)), max(1, math.floor(columns * share))
    rows = max(math.floor(math.sqrt(most * height / width)), rows)
    columns = max(math.floor(math.sqrt(most * width / height)), columns)
    if rows * columns > most and columns > rows:
        columns = math.floor(most / rows)
    elif rows * columns > most:
        rows = math.floor(most / columns)
    return max(1, rows), max(1, columns)


def patch_side(spec: ImageSpec) -> int:
    """The side in pixels of a patch, of which each makes one image embedding."""
    return spec.size // math.isqrt(spec.tokens)


def _up(side: int, size: int) -> int:
    """The next multiple of a tile."""
    return math.ceil(side / size) * size


def _cut(
    canvas: tuple[int, int],
    rows: int,
    columns: int,
    spec: ImageSpec,
    tiles: TileSpec,
    resized: tuple[int, int] | None = None,
) -> Plan:
    """A canvas cut into a grid, with the overview that the spec wants."""
    size = spec.size
    boxes = tuple(
        (x * size, y * size, (x + 1) * size, (y + 1) * size)
        for y in range(rows)
        for x in range(columns)
    )
    n = len(boxes) + (tiles.overview != "none")
    return Plan(canvas, boxes, n * spec.tokens, resized, (rows, columns), tiles.overview)


def _pinpoints(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """LLaVA-NeXT's rule among as many tiles as there may be, and the whole picture."""
    fitting = [
        (w, h)
        for w, h in tiles.canvases
        if not tiles.max_tiles or w * h // spec.size**2 < tiles.max_tiles
    ]
    if fitting:
        yield _on_canvas(width, height, _best(width, height, fitting), spec, tiles)
    whole = single(width, height, spec)
    yield replace(whole, rows=whole.rows + (tiles.map is not None))


def _best(width: int, height: int, canvases: list[tuple[int, int]]) -> tuple[int, int]:
    """The first canvas with most pixels of the picture, and of those with fewest others (LLaVA,
    llava/mm_utils.py, select_best_resolution).
    """

    def waste(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return -used, canvas[0] * canvas[1] - used

    return min(canvases, key=waste)


def _on_canvas(
    width: int, height: int, canvas: tuple[int, int], spec: ImageSpec, tiles: TileSpec
) -> Plan:
    """The picture in its own shape in the middle of a canvas (llava/mm_utils.py,
    resize_and_pad_image).
    """
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        resized = canvas[0], min(math.ceil(height * across), canvas[1])
    else:
        resized = min(math.ceil(width * down), canvas[0]), canvas[1]
    at = (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
    cut = _cut(canvas, canvas[1] // spec.size, canvas[0] // spec.size, spec, tiles, resized)
    made = replace(cut, at=at)
    return _mapped(made, width, height, spec.tokens, tiles.map) if tiles.map else made


def _mapped(made: Plan, width: int, height: int, tokens: int, joined: MapSpec) -> Plan:
    """A plan with the map of its grid (llava/model/llava_arch.py, unpad_image; LLaVA-NeXT's for
    anyres_max).
    """
    side = math.isqrt(tokens)
    rows, columns = made.grid[0] * side, made.grid[1] * side
    if width / height > columns / rows:
        edge = (rows - _whole(height * (columns / width), joined.digits)) // 2
        kept = (0, edge, columns, rows - edge)
    else:
        edge = (columns - _whole(width * (rows / height), joined.digits)) // 2
        kept = (edge, 0, columns - edge, rows)
    w, h = kept[2] - kept[0], kept[3] - kept[1]
    shrunk = None
    times = math.sqrt(w * h / (joined.most * tokens)) if joined.most else 0
    if times > _SHRINK_ABOVE:
        w, h = shrunk = int(w // times), int(h // times)
    overview = tokens if made.overview != "none" else 0
    return replace(made, rows=overview + h * (w + 1), kept=kept, shrunk=shrunk)


def _hd(width: int, height: int, spec: ImageSpec, tiles: TileSpec) -> Iterator[Plan]:
    """Phi-3-Vision's rule (processing_phi3_v.py, HD_transform). What is one tile is its own
    overview to the last bit, and the encoder sees it once.
    """
    size, turned = spec.size, width < height
    ratio = max(width, height) / min(width, height)
    most = min(tiles.most, max(tiles.max_tiles - 1, 1)) if tiles.max_tiles else tiles.most
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= most:
        columns += 1
    wide = columns * size
    high = int(wide / ratio)
    if not high:
        raise ImageError(
            f"the picture of {width} x {height} pixels",
            "is too long and narrow for this model; cut out a part of it",
        )
    rows = math.ceil(high / size)
    at, grid, canvas = (0, (rows * size - high) // 2), (rows, columns), (wide, rows * size)
    if turned:
        at, grid, canvas = at[::-1], grid[::-1], canvas[::-1]
    whole = tiles if rows * columns > 1 else replace(tiles, overview="none")
    made = _cut(canvas, *grid, spec, whole, (wide, high))
    side = math.isqrt(spec.tokens)
    kept = (0, 0, grid[1] * side, grid[0] * side)
    # Every line of the grid and of the overview has its newline, and between them is one row more.
    n_rows = (rows * columns + 1) * spec.tokens + (grid[0] + 1) * side + 1
    yield replace(made, rows=n_rows, kept=kept, at=at, turned=turned)


def _whole(length: float, digits: int | None) -> int:
    return int(length if digits is None else round(length, digits))


# Each yields the plans of a picture, the finest first and one of a single tile last.
RULES: Mapping[TileRule, Callable[[int, int, ImageSpec, TileSpec], Iterator[Plan]]] = {
    "longest-edge": _longest_edge,
    "ratio": _ratio,
    "pinpoints": _pinpoints,
    "pan-and-scan": _pan_and_scan,
    "hd": _hd,
    "overlap": _overlap,
}
