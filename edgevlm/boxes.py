"""Boxes out of an answer's text."""

from __future__ import annotations

import json
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


# After Qwen2-VL: the label, then two corners in thousandths; the tokens around them are no text.
_CORNERS = re.compile(r"([^()\[\]{}\n]*)\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)", re.ASCII)
# After Qwen2.5-VL: an object of its own for every box, wherever the list around them ends.
_OBJECT = re.compile(r"\{[^{}]*\"bbox_2d\"[^{}]*\}")


def parse_qwen(text: str, width: int, height: int) -> list[Box]:
    """Reads Qwen2.5-VL's `{"bbox_2d": [x0, y0, x1, y1], "label": label}`, in pixels of a
    width x height picture as the model saw it, and Qwen2-VL's `label(x0,y0),(x1,y1)`, thousandths
    of its sides, into boxes in such pixels, cut off where the picture ends. Text that is not a box,
    and a box that ends before it begins, is passed over.
    """
    sides = (width, height) * 2
    found = [_object(match[0]) for match in _OBJECT.finditer(text)]
    if not found:
        found = [
            (m[1].strip(), [int(n) * s / 1000 for n, s in zip(m.groups()[1:], sides, strict=True)])
            for m in _CORNERS.finditer(text)
        ]
    boxes = []
    for label, corners in (f for f in found if f):
        x0, y0, x1, y1 = (
            min(max(n, 0.0), float(most)) for n, most in zip(corners, sides, strict=True)
        )
        if x0 <= x1 and y0 <= y1:
            boxes.append(Box(x0, y0, x1, y1, label))
    return boxes


def _object(text: str) -> tuple[str, list[float]] | None:
    """The label and the corners of an object in JSON; None for another."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    corners, label = found["bbox_2d"], found.get("label", "")
    numbers = isinstance(corners, list) and len(corners) == 4
    if not numbers or not all(type(n) in (int, float) for n in corners):
        return None
    return str(label), [float(n) for n in corners]
