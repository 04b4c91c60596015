"""Answers as notebooks show them: HTML in which a model's words are text and nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from PIL import Image

from edgevlm.drawing import draw
from edgevlm.errors import EdgeVLMError
from edgevlm.image import RGB, read_image
from edgevlm.types import Box, Point, Reply, TokenLogprob

_LONGEST_SIDE = 640
# The shade of a token that the model was not sure of at all.
_UNSURE = "230, 159, 0"


def html(reply: Reply) -> str:
    """The reply's text, and the picture with its boxes and points where there are some and it can
    be read without the network. With log-probabilities each token is shaded by how unsure the model
    was of it, and names the likeliest others.
    """
    words = "".join(_shaded(reply.logprobs)) if reply.logprobs else escape(reply.text)
    return f'{_boxes(reply)}<pre style="white-space: pre-wrap">{words}</pre>'


def found(box: Box | Point) -> str:
    """A box or a point in words, and the mask of a box that has one, white on black, of the
    picture's shape.
    """
    words = f"<pre>{escape(repr(box))}</pre>"
    if isinstance(box, Point) or box.mask is None:
        return words
    return words + _image(Image.fromarray(box.mask.astype(np.uint8) * 255), "mask")


def conversation(pictures: Sequence[RGB], turns: Sequence[tuple[str, Reply]]) -> str:
    """The pictures uint8 [h, w, 3] of a chat, and its questions with their answers."""
    shown = "".join(_image(Image.fromarray(picture), "picture") for picture in pictures)
    return shown + "".join(
        f'<p style="white-space: pre-wrap"><b>{escape(question)}</b></p>{html(reply)}'
        for question, reply in turns
    )


def _shaded(tokens: Sequence[TokenLogprob]) -> Iterator[str]:
    """A span for each token, or for those that are one character together."""
    held: list[TokenLogprob] = []
    for i, token in enumerate(tokens, 1):
        held.append(token)
        data = b"".join(one.data for one in held)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            if i < len(tokens) and len(data) < 4:
                continue
            text = data.decode(errors="replace")
        sure = math.exp(min(one.logprob for one in held))
        about = [f"{sure:.2f}", *(f"{other.text!r} {math.exp(other.logprob):.2f}"
                                  for other in held[-1].top)]  # fmt: skip
        shade = f"background: rgba({_UNSURE}, {1 - sure:.2f})"
        yield f'<span style="{shade}" title="{escape("; ".join(about))}">{escape(text)}</span>'
        held.clear()


def _boxes(reply: Reply) -> str:
    source = reply.picture
    things: list[Box | Point] = [*reply.boxes, *reply.points]
    if not things or source is None or (isinstance(source, str) and "://" in source):
        return ""
    try:
        picture = draw(read_image(source), things)
    except EdgeVLMError:
        return ""  # It is gone, and the text says where the boxes are.
    return _image(picture, ", ".join(dict.fromkeys(thing.label for thing in things)))


def _image(picture: Image.Image, description: str) -> str:
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
