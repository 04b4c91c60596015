"""Positions of a prompt's rows: one after the other, or M-RoPE's, by the shapes of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.films import Film
from edgevlm.prompt import Image, Tokens
from edgevlm.runtimes.engines import Float, Int32, following
from edgevlm.specs import VideoSpec
from edgevlm.video import time_step

Cells = tuple[int, int]


@dataclass(frozen=True)
class Reel:
    """The pictures of a request that are the pairs of a video's frames, each `step` positions in
    time after the one before it.
    """

    pictures: range
    step: int


def placed(
    segments: Sequence[Image | Tokens],
    rows: Sequence[Float],
    cells: Sequence[Cells] | None,
    reels: Sequence[Reel] = (),
) -> list[Int32]:
    """The positions of each segment's rows, int32 [n]; with M-RoPE, where `cells` are the lines and
    columns of every picture, int32 [n, 4].

    There a picture stands at one time, its embeddings at their lines and columns behind that, and
    what follows behind all of them: not after as many positions as it has rows. The lines and
    columns of a reel's pictures are the same.
    """
    found, start, end = list[Int32](), 0, 0
    later = {i: n * reel.step for reel in reels for n, i in enumerate(reel.pictures)}
    for segment, its in zip(segments, rows, strict=True):
        if cells and isinstance(segment, Image):
            if not (time := later.get(segment.index, 0)):
                start = max(start, end)
            places = _in_picture(start, *cells[segment.index])
            places[:, 0] += time
            found.append(places)
            end = int(places.max()) + 1
        else:
            start = max(start, end)
            found.append(following(start, len(its), mrope=cells is not None))
            start += len(its)
    return found


def film_step(spec: VideoSpec, film: Film) -> int:
    """The step of a video's pairs; raises PromptError where its frames are too near to each other.

    Frames a second are those that were asked for, or else as many as their times say.
    """
    fps, span = film.fps, film.times[-1] - film.times[0]
    if fps is None and span > 0:
        # Times are rounded, and what they say may be cut off to whole seconds.
        fps = round((len(film.times) - 1) / span, 6)
    # Two frames are at one time however far they are apart.
    return time_step(spec, fps or spec.fps) if len(film.times) > 2 else 1


def _in_picture(time: int, lines: int, columns: int) -> Int32:
    places = np.zeros((lines, columns, 4), np.int32)
    places[..., :3] = time
    places[..., 1] += np.arange(lines)[:, None]
    places[..., 2] += np.arange(columns)
    return places.reshape(-1, 4)
