"""Positions of a prompt's rows: one after the other, or M-RoPE's, by the shapes of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgevlm.prompt import Image, Tokens
from edgevlm.runtimes.engines import Float, Int32, following

Cells = tuple[int, int]


def placed(
    segments: Sequence[Image | Tokens], rows: Sequence[Float], cells: Sequence[Cells] | None
) -> list[Int32]:
    """The positions of each segment's rows, int32 [n]; with M-RoPE, where `cells` are the lines and
    columns of every picture, int32 [n, 4].

    There a picture stands at one time, its embeddings at their lines and columns behind that, and
    what follows behind all of them: not after as many positions as it has rows.
    """
    found, start = list[Int32](), 0
    for segment, its in zip(segments, rows, strict=True):
        if cells and isinstance(segment, Image):
            found.append(_in_picture(start, *cells[segment.index]))
            start += max(cells[segment.index])
        else:
            found.append(following(start, len(its), mrope=cells is not None))
            start += len(its)
    return found


def _in_picture(time: int, lines: int, columns: int) -> Int32:
    places = np.zeros((lines, columns, 4), np.int32)
    places[..., :3] = time
    places[..., 1] += np.arange(lines)[:, None]
    places[..., 2] += np.arange(columns)
    return places.reshape(-1, 4)
