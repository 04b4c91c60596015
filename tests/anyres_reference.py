"""LLaVA-NeXT's kin in transformers' own classes, and a bundle's input as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.prompt import Image
from edgevlm.runtimes.request import Request, input_blocks, prefill
from edgevlm.runtimes.session import VLM

Picture = NDArray[np.uint8]


class Original:
    """A checkpoint in transformers' classes of a kind ("LlavaNext")."""

    def __init__(self, folder: Path, kind: str) -> None:
        from edgevlm.export.parity.references import llava_next, llava_onevision

        self.together = kind == "LlavaOnevision"
        self.model = llava_next.load(folder)
        own = llava_onevision if self.together else llava_next
        self.processor = own.load_processor(folder)

    @property
    def image_token(self) -> int:
        """The id that stands for an image embedding."""
        return int(self.model.config.image_token_id)

    def inputs(self, text: str, pictures: Sequence[Picture]) -> Any:
        """The processor's; a list of pictures is one sample's."""
        given: Any = list(pictures) or None
        if self.together and given:
            given = [given]
        return self.processor(text=[text], images=given, return_tensors="pt")

    def logits(self, inputs: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)]).long()], 1)
        given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = self.model(input_ids=ids, **given, logits_to_keep=len(tokens) + 1)
        rows: NDArray[np.float32] = out.logits[0].numpy()
        return rows


def sequence(vlm: VLM, request: Request, image_token: int) -> list[int]:
    """The input's token ids, each image embedding as the token that stands for it."""
    rows = [picture.plan(request.image).rows for picture in request.pictures]
    ids: list[int] = []
    for segment in request.segments:
        if isinstance(segment, Image):
            ids += [image_token] * rows[segment.index]
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
