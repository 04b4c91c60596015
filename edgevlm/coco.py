"""Found objects as COCO has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.types import Box


class CocoSet:
    """A data set in COCO's format for object detection: boxes as [x, y, width, height] in pixels,
    masks as run lengths, a category for each label, by the order in which they come.

    >>> from edgevlm.coco import CocoSet
    >>> found = CocoSet()
    >>> found.add("a.png", 480, 360, [edgevlm.Box(45, 48, 122, 123, "circle")])
    >>> found.as_dict()["annotations"][0]["bbox"]
    [45, 48, 77, 75]
    """

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories: dict[str, int] = {}

    def add(self, file_name: str, width: int, height: int, boxes: Sequence[Box]) -> None:
        """Adds a picture of width x height pixels and what was found in it, if anything."""
        image_id = len(self._images) + 1
        self._images.append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height}
        )
        for box in boxes:
            x0, x1 = sorted((box.x0, box.x1))
            y0, y1 = sorted((box.y0, box.y1))
            found: dict[str, Any] = {
                "id": len(self._annotations) + 1,
                "image_id": image_id,
                "category_id": self._categories.setdefault(box.label, len(self._categories) + 1),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "area": round((x1 - x0) * (y1 - y0), 2),
                "iscrowd": 0,
            }
            if box.mask is not None:
                found["area"] = int(box.mask.sum())
                found["segmentation"] = encoded(box.mask)
            self._annotations.append(found)

    def as_dict(self) -> dict[str, Any]:
        """The data set, to be written as JSON."""
        return {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": i, "name": name} for name, i in self._categories.items()],
        }


def encoded(mask: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """A mask bool [h, w] as COCO has it: `size` [h, w], and `counts`, the lengths of its runs down
    its columns, of zeros and ones in turn, zeros first.
    """
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = [*changes.tolist(), len(flat)]
    starts = [0, *changes.tolist()]
    runs = [end - start for start, end in zip(starts, ends, strict=True)]
    return {"counts": [0, *runs] if len(flat) and flat[0] else runs, "size": list(mask.shape)}


def decoded(mask: dict[str, list[int]]) -> npt.NDArray[np.bool_]:
    """A mask bool [h, w] from what `encoded` made of it."""
    height, width = mask["size"]
    flat = np.zeros(height * width, bool)
    ends = list(accumulate(mask["counts"]))
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        flat[start:end] = True
    return flat.reshape(width, height).T
