"""The way of a picture to the encoder, from its size alone: integers, no pixels.

The plan is also what says how many image embeddings a picture makes, before anything is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.errors import ImageError
from edgevlm.specs import ImageSpec

# What a long and narrow picture may become on the way to a square: half a gigabyte, enough for one
# of 1 x 1000 pixels whose short side becomes 336.
MAX_RESIZED = 1 << 27


@dataclass(frozen=True)
class Plan:
    """The canvas of a picture and the squares that are cut out of it.

    `canvas` is the width and height that the picture has after resizing and padding, `tiles` are
    the squares that the encoder sees of it, as left, top, right and bottom, row by row. With
    `overview` the whole picture is one more square. `rows` are the image embeddings of all of them.
    """

    canvas: tuple[int, int]
    tiles: tuple[tuple[int, int, int, int], ...]
    overview: bool
    rows: int


def plan(width: int, height: int, spec: ImageSpec) -> Plan:
    """Plans a picture of this size in pixels, whose middle is the one tile there is.

    Raises ImageError for a picture so long and narrow that "pad" or "crop" would swell it.
    """
    size, side = spec.size, spec.resize or spec.size
    canvas = (side, side)
    if spec.fit == "crop" and width <= height:
        canvas = (side, int(side * height / width))
    elif spec.fit == "crop":
        canvas = (int(side * width / height), side)
    # Pillow holds 4 bytes a pixel. A pad has only strips of its square in memory, but goes through
    # every row at full width.
    long = max(width, height)
    swollen = max(long * side, long * height // 4) if spec.fit == "pad" else math.prod(canvas)
    if spec.fit != "stretch" and swollen > MAX_RESIZED:
        raise ImageError(
            f"the picture of {width} x {height} pixels",
            "is too long and narrow for this model; cut out a part of it",
        )
    # As CLIPImageProcessor cuts out the middle.
    left, top = (canvas[0] - size) // 2, (canvas[1] - size) // 2
    return Plan(canvas, ((left, top, left + size, top + size),), False, spec.tokens)
