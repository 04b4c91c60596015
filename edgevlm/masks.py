"""Masks of found objects: from the decoder's square to the picture's pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgevlm.types import Box

# Codes of a mask and how many different ones there are: <seg000> to <seg127>.
N_CODES, N_ENTRIES = 16, 128


def one_hot(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Codes int [n, 16] -> float32 [n, 16, 128], what the mask decoder reads."""
    return np.eye(N_ENTRIES, dtype=np.float32)[codes]


def in_picture(
    square: npt.NDArray[np.float32], box: Box, width: int, height: int
) -> npt.NDArray[np.bool_]:
    """A decoded mask float32 [64, 64], above 0 inside, in its box: bool [height, width].

    As big_vision's evaluator does it: the box in whole pixels, the mask resized to it bilinearly.
    """
    from PIL import Image

    found = np.zeros((height, width), bool)
    x0, x1 = (min(max(int(v), 0), width) for v in sorted((box.x0, box.x1)))
    y0, y1 = (min(max(int(v), 0), height) for v in sorted((box.y0, box.y1)))
    if x1 > x0 and y1 > y0:
        size, bilinear = (x1 - x0, y1 - y0), Image.Resampling.BILINEAR
        found[y0:y1, x0:x1] = np.asarray(Image.fromarray(square).resize(size, bilinear)) > 0
    return found
