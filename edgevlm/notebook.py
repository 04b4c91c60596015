"""Replies as notebooks show them: HTML in which a model's words are text and nothing else."""

from __future__ import annotations

import base64
import io
from html import escape

from edgevlm.drawing import draw
from edgevlm.errors import EdgeVLMError
from edgevlm.image import read_image
from edgevlm.types import Reply

_LONGEST_SIDE = 640


def html(reply: Reply) -> str:
    """The reply's text, and the picture with its boxes where there are some and it can be read
    without the network.
    """
    text = f'<pre style="white-space: pre-wrap">{escape(reply.text)}</pre>'
    return _picture(reply) + text


def _picture(reply: Reply) -> str:
    source = reply.picture
    if not reply.boxes or source is None or (isinstance(source, str) and "://" in source):
        return ""
    try:
        picture = draw(read_image(source), reply.boxes)
    except EdgeVLMError:
        return ""  # It is gone, and the text says where the boxes are.
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    labels = ", ".join(dict.fromkeys(box.label for box in reply.boxes))
    return f'<img alt="{escape(labels)}" src="data:image/png;base64,{data}">'
