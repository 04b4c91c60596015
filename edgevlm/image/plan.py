"""The way of a picture to the encoder, from its size alone: integers, no pixels.

The plan is also what says how many image embeddings a picture makes, before anything is computed.
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm.image.planned import Plan
from edgevlm.image.tiling import RULES
from edgevlm.image.whole import native, single
from edgevlm.specs import ImageSpec

# Pixels of a square that encoders for pictures of any size are measured with; squares along a side
# of one that their numbers are checked with, which is quick and has windows that are not whole.
_MEASURED_SIDE, _CHECKED_SQUARES = 448, 5


def plan(width: int, height: int, spec: ImageSpec) -> Plan:
    """Plans a picture of this size in pixels.

    Raises ImageError for a picture so long and narrow that "pad" or "crop" would swell it, or that
    a model which keeps its shape does not take.
    """
    if spec.native:
        return native(width, height, spec, spec.native)
    if spec.tiles is None:
        return single(width, height, spec)
    plans = RULES[spec.tiles.rule](width, height, spec, spec.tiles)
    return next(p for p in plans if p.n_tiles <= (spec.tiles.max_tiles or p.n_tiles))


def limited(
    spec: ImageSpec, max_tiles: int | None = None, max_pixels: int | None = None
) -> ImageSpec:
    """The spec with no more tiles than that of a picture, or pixels of one that keeps its shape;
    None leaves it as it is.
    """
    if max_pixels and spec.native:
        bound = min(max_pixels, spec.native.most)
        return replace(spec, native=replace(spec.native, max_pixels=bound))
    if max_tiles is None or spec.tiles is None:
        return spec
    return replace(spec, tiles=replace(spec.tiles, max_tiles=max_tiles))


def checked_side(spec: ImageSpec) -> int:
    """The side of the square that an encoder's numbers are checked with, in pixels."""
    return spec.size * _CHECKED_SQUARES if spec.native else spec.size


def measured_side(spec: ImageSpec) -> int:
    """The side of the square that an encoder's time is measured with, in pixels."""
    if spec.native is None:
        return spec.size
    return plan(_MEASURED_SIDE, _MEASURED_SIDE, spec).canvas[0]


def among(spec: ImageSpec, n: int) -> ImageSpec:
    """The spec of each picture of a request with `n` of them."""
    if n < 2 or spec.tiles is None or not spec.tiles.alone:
        return spec
    return replace(limited(spec, 1), fit="pad")
