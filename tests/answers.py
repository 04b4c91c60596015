"""A bundle's input as token ids, and its likeliest answer with the logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.prompt import Image
from edgevlm.runtimes.request import Request, input_blocks, prefill
from edgevlm.runtimes.session import VLM


def sequence(request: Request, image_token: int) -> list[int]:
    """The input's token ids, each image embedding as the token that stands for it."""
    shown = zip(request.pictures, request.specs, strict=True)
    rows = [picture.plan(spec).rows for picture, spec in shown]
    ids: list[int] = []
    for segment in request.segments:
        if isinstance(segment, Image):
            ids += [image_token] * len(range(rows[segment.index])[segment.begin : segment.end])
        else:
            ids += segment.ids
    assert len(ids) == request.n_image + request.n_text
    return ids


def greedy(vlm: VLM, request: Request, n: int) -> tuple[NDArray[np.float32], list[int]]:
    """Logits [1 + n, n_vocab] after the input and after each of the n likeliest tokens."""
    prefill(vlm.engines, request, input_blocks(vlm.engines, request), n)
    logits, tokens = [vlm.engines.decoder.logits()], list[int]()
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.engines.decoder.step(tokens[-1])
        logits.append(vlm.engines.decoder.logits())
    return np.stack(logits), tokens
