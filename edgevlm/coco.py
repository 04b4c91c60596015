"""Found objects as COCO has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.types import Box


def coco(boxes: Sequence[Box], width: int, height: int, file_name: str) -> dict[str, Any]:
    """A data set of one picture in COCO's format for object detection: boxes as [x, y, width,
    height] in pixels, masks as run lengths, categories by the labels in their order.
    """
    names = list(dict.fromkeys(box.label for box in boxes))
    annotations = []
    for i, box in enumerate(boxes, 1):
        x0, x1 = sorted((box.x0, box.x1))
        y0, y1 = sorted((box.y0, box.y1))
        found: dict[str, Any] = {
            "id": i,
            "image_id": 1,
            "category_id": names.index(box.label) + 1,
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "area": round((x1 - x0) * (y1 - y0), 2),
            "iscrowd": 0,
        }
        if box.mask is not None:
            found["area"] = int(box.mask.sum())
            found["segmentation"] = {"counts": run_lengths(box.mask), "size": [height, width]}
        annotations.append(found)
    return {
        "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


def run_lengths(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of a mask bool [h, w] down its columns, of zeros and ones in turn, zeros
    first.
    """
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = [*changes.tolist(), len(flat)]
    starts = [0, *changes.tolist()]
    runs = [end - start for start, end in zip(starts, ends, strict=True)]
    return [0, *runs] if len(flat) and flat[0] else runs
