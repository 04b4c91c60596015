"""Bounds of the numbers in a manifest's specs: beyond them no engine has sizes, and a picture would
take more memory than there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgevlm.specs import DecoderSpec, ImageSpec, RegionSpec, TileSpec, VideoSpec

_SIDE, _MANY, _LARGEST = 1 << 13, 1 << 12, 1 << 24
_IMAGE = {
    "size": (1, _SIDE),
    "tokens": (1, 1 << 16),
    "max_pictures": (1, _LARGEST),
    "resize": (0, 2 * _SIDE),
    "shortest": (0, _SIDE),
}
_TILES = {
    "longest_edge": (0, 1 << 16),
    "max_tiles": (0, _MANY),
    "least": (0, _MANY),
    "most": (0, _MANY),
    "margin": (0, _MANY),
}
# A picture of 268 million pixels has more patches than any decoder has positions.
_NATIVE = {"least": (1, 1 << 28), "most": (1, 1 << 28), "max_pixels": (0, 1 << 28)}
_REGIONS = {
    "coord_bins": (1, 1 << 16),
    "size_bins": (2, 1 << 16),
    "end": (0, _LARGEST),
    "most": (1, _MANY),
}
_DECODER = {
    "n_embd": (1, 1 << 20),
    "n_layer": (1, 512),
    "n_vocab": (1, _LARGEST),
    "context_length": (1, _LARGEST),
    "short_context": (0, _LARGEST),
}


_VIDEO = {
    "most": (1, _MANY),
    "longest_edge": (0, 1 << 16),
    "least": (1, _MANY),
    "total": (0, 1 << 40),
    "per_second": (0, _MANY),
}


def out_of_bounds(
    image: ImageSpec,
    decoder: DecoderSpec | None,
    regions: RegionSpec | None = None,
    video: VideoSpec | None = None,
) -> str:
    """The first number that no bundle has, as one line for a message; "" where all are well."""
    return next(_problems(image, decoder, regions, video), "")


def _problems(
    image: ImageSpec,
    decoder: DecoderSpec | None,
    regions: RegionSpec | None,
    video: VideoSpec | None,
) -> Iterator[str]:
    yield from _outside("image", image, _IMAGE)
    if not all(image.std):
        yield "'image.std' has a zero"
    for key in ("mean", "std"):
        if not all(abs(x) <= _LARGEST for x in getattr(image, key)):
            yield f"'image.{key}' has a number beyond {_LARGEST}"
    if image.fill and not all(0 <= c <= 255 for c in image.fill):
        yield "'image.fill' is not a colour"
    if image.tiles:
        yield from _outside("image.tiles", image.tiles, _TILES)
        if not all(1 <= side <= 1 << 16 for canvas in image.tiles.canvases for side in canvas):
            yield "'image.tiles.canvases' has a side that is none"
        if not all(0 <= c <= 255 for c in image.tiles.fill):
            yield "'image.tiles.fill' is not a colour"
        if image.tiles.rule == "overlap" and (problem := overlap_problem(image, image.tiles)):
            yield f"'image.tiles.margin' is {image.tiles.margin}: {problem}"
    if image.native:
        yield from _outside("image.native", image.native, _NATIVE)
    if decoder:
        yield from _outside("decoder", decoder, _DECODER)
    if regions:
        yield from _outside("regions", regions, _REGIONS)
    if video:
        yield from _outside("prompt.video", video, _VIDEO)
        if video.native:
            yield from _outside("prompt.video.native", video.native, _NATIVE)
        if not 0 < video.fps <= _MANY or not 0 <= video.skip <= _MANY:
            yield "'prompt.video' has times that no video has"


def overlap_problem(image: ImageSpec, tiles: TileSpec) -> str:
    """The reason why tiles cannot overlap as they should, "" where they can."""
    side = math.isqrt(image.tokens)
    if side**2 != image.tokens or image.size % side:
        return f"a tile of {image.size} pixels is not {image.tokens} patches in a square"
    if 2 * tiles.margin >= side or tiles.most < 1:
        return f"a tile of {side} patches a side has none of its own"
    return ""


def _outside(where: str, spec: Any, bounds: dict[str, tuple[int, int]]) -> Iterator[str]:
    for key, (low, high) in bounds.items():
        value = getattr(spec, key)
        if not low <= value <= high:
            yield f"'{where}.{key}' is {str(value)[:20]}, not {low} to {high}"
