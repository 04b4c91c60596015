"""Boxes out of an answer's text."""

from __future__ import annotations

import re

from edgevlm.types import Box

# After big_vision's evaluators: four locations, an optional mask of 16 codes, then the label.
_LOC = re.compile(
    r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>\s*((?:<seg\d{3}>){16})?\s*([^;<>]*)"
)
# big_vision trains on round(v * 1023), so 1023 inverts it exactly (many demos divide by 1024).
_LOC_MAX = 1023


def parse_loc(text: str, width: int, height: int) -> list[Box]:
    """Reads `<locY0><locX0><locY1><locX1> label ; …` into boxes in pixels of a width x height
    picture. Text that is not a box is passed over.
    """
    boxes = []
    for match in _LOC.finditer(text):
        y0, x0, y1, x1 = (int(match[i]) / _LOC_MAX for i in range(1, 5))
        segment = tuple(int(s) for s in re.findall(r"<seg(\d{3})>", match[5] or ""))
        label = match[6].strip()
        boxes.append(Box(x0 * width, y0 * height, x1 * width, y1 * height, label, segment))
    return boxes


# After MiniGPT-v2: a phrase in the picture, where there is one, and its boxes. What stands in
# braces and is not a box does not end the list.
_GROUNDED = re.compile(r"(?:<p>([^<>]*)</p>\s*)?(\{[^{}]*\}(?:\s*<delim>\s*\{[^{}]*\})*)")
_PERCENT = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", re.ASCII)


def parse_percent(text: str, width: int, height: int) -> list[Box]:
    """Reads `<p>label</p> {<X0><Y0><X1><Y1>}<delim>{…}`, hundredths of the picture's sides, into
    boxes in pixels of a width x height picture. The label may be missing. Text that is not a
    box, and a box that lies outside of the picture or ends before it begins, is passed over.
    """
    boxes = []
    for group in _GROUNDED.finditer(text):
        label = (group[1] or "").strip()
        for match in _PERCENT.finditer(group[2]):
            x0, y0, x1, y1 = (int(number) for number in match.groups())
            if x0 <= x1 <= 100 and y0 <= y1 <= 100:
                x, y = width / 100, height / 100
                boxes.append(Box(x0 * x, y0 * y, x1 * x, y1 * y, label))
    return boxes
