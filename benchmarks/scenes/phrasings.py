"""Phrasings: several forms of every question. Data only."""

from __future__ import annotations

COLOUR_FORMS = (
    "what {colour} is the {x}",
    "what is the {colour} of the {x}",
    "what's the {colour} of the {x}",
    "which {colour} is the {x}",
    "which {colour} does the {x} have",
    "what {colour} does the {x} have",
    "{colour} of the {x}",
    "tell me the {colour} of the {x}",
    "the {x} is what {colour}",
    "name the {colour} of the {x}",
)
SHAPE_FORMS = (
    "what shape is {x}",
    "which shape is {x}",
    "what is the {x} shape",
    "what shape is the {x} object",
    "what is the shape of the {x} object",
    "what kind of shape is {x}",
    "which object is {x}",
    "what object is {x}",
    "what is {x}",
    "name the {x} shape",
)
WHAT_FORMS = (
    "what is this",
    "what object is this",
    "what is shown",
    "what object is in the picture",
)
COUNT_FORMS = (
    "how many {x} are there",
    "how many {x} can you see",
    "how many {x} do you see",
    "how many {x} are in the picture",
    "how many {x} are in the image",
    "how many {x} are there in the picture",
    "how many {x} are shown",
    "how many {x}",
    "what is the number of {x}",
    "count the {x}",
    "number of {x}",
)
EXISTS_FORMS = (
    "is there {x}",
    "is there {x} in the picture",
    "is there {x} in the image",
    "is {x} in the picture",
    "do you see {x}",
    "can you see {x}",
    "does the picture show {x}",
    "does the image contain {x}",
)
EXISTS_MANY_FORMS = (
    "are there any {x}",
    "are there {x}",
    "can you see any {x}",
    "do you see any {x}",
)
POSITION_FORMS = (
    "what is {side} the {x}",
    "what is {side} the {x}",
    "which {thing} is {side} the {x}",
    "what {thing} is {side} the {x}",
    "what's {side} the {x}",
    "what can you see {side} the {x}",
    "name the {thing} {side} the {x}",
)
SIDES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
}
OCR_FORMS = (
    "what word is written",
    "what does the text say",
    "which word is in the picture",
    "read the text",
)
