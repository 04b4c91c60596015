"""Plans of pictures that are not cut: one square, or the picture in its own shape."""

from __future__ import annotations

import math

from edgevlm.errors import ImageError
from edgevlm.image.planned import Plan
from edgevlm.specs import ImageSpec, NativeSpec

# What a long and narrow picture may become on the way to a square: half a gigabyte, enough for one
# of 1 x 1000 pixels whose short side becomes 336.
MAX_RESIZED = 1 << 27
# Qwen2-VL's processor refuses pictures of a longer shape.
_LONGEST_SHAPE = 200


def single(width: int, height: int, spec: ImageSpec) -> Plan:
    """A picture whose middle is the one tile there is."""
    if spec.fit == "letterbox":
        return _letterbox(width, height, spec)
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
    return Plan(canvas, ((left, top, left + size, top + size),), spec.tokens)


def _letterbox(width: int, height: int, spec: ImageSpec) -> Plan:
    """DeepSeek-VL's rule (deepseek_vl/models/image_processing_vlm.py; transformers 4.57,
    DeepseekVLImageProcessor).
    """
    size, long = spec.size, max(width, height)
    scale = size / long
    # transformers stops at pictures whose long side it rounds to another; the original has none.
    scaled = spec.rounding == "scale" and int(long * scale) == size

    def resized(side: int) -> int:
        return max(int(side * scale if scaled else side / long * size), spec.shortest)

    w, h = resized(width), resized(height)
    at = (size - w) // 2, (size - h) // 2
    return Plan((size, size), ((0, 0, size, size),), spec.tokens, (w, h), at=at)


def native(width: int, height: int, spec: ImageSpec, rule: NativeSpec) -> Plan:
    """Qwen2-VL's rule (transformers 4.57, qwen2_vl, smart_resize)."""
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise ImageError(
            f"the picture of {width} x {height} pixels",
            f"is too long and narrow for this model, whose pictures have no side of more than "
            f"{_LONGEST_SHAPE} times the other; cut out a part of it",
        )
    size, most = spec.size, min(rule.max_pixels or rule.most, rule.most)
    # Python's round: halves go to the even number.
    w, h = round(width / size) * size, round(height / size) * size
    if w * h > most:
        times = math.sqrt(height * width / most)
        w, h = (max(size, math.floor(side / times / size) * size) for side in (width, height))
    elif w * h < rule.least:
        times = math.sqrt(rule.least / (height * width))
        w, h = (math.ceil(side * times / size) * size for side in (width, height))
    cells = h // size, w // size
    return Plan((w, h), ((0, 0, w, h),), math.prod(cells) * spec.tokens, cells=cells)
