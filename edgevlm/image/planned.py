"""The plan of a picture: its tiles, and the canvas that they are cut from."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.specs import Overview

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """Tiles of a picture, and the canvas that they are cut from.

    `canvas` is the width and height that the picture has after resizing and padding, `resized`
    those that it is resized to before that, if at all. `tiles` are the parts that the encoder sees
    of the canvas, each as a square, as left, top, right and bottom, row by row, `grid` their rows
    and columns, (0, 0) for a picture that is not cut. `overview` is where the whole picture stands
    among them as one more square. `at` is where the resized picture lies on the canvas, left and
    top of it; None where it is stretched to the canvas; it is `turned`, rows for columns, while it
    is resized. `kept` is the box of the map of the grid's
    image embeddings (TileSpec.map) that is not padding, `shrunk` the width and height that it is
    resized to, if at all. `rows` are the image embeddings of the picture, `cells` their lines and
    columns where it keeps its shape.
    """

    canvas: tuple[int, int]
    tiles: tuple[Box, ...]
    rows: int
    resized: tuple[int, int] | None = None
    grid: tuple[int, int] = (0, 0)
    overview: Overview = "none"
    at: tuple[int, int] | None = None
    kept: Box | None = None
    shrunk: tuple[int, int] | None = None
    cells: tuple[int, int] = (0, 0)
    turned: bool = False

    @property
    def n_tiles(self) -> int:
        """Squares that the encoder sees, the overview among them."""
        return len(self.tiles) + (self.overview != "none")
