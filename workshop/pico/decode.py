"""Greedy answers from the torch model: the reference that exported bundles are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from workshop.pico.batches import attention_mask
from workshop.pico.model import Pico, to_pixels
from workshop.pico.shards import model_input
from workshop.pico.tokenizer import EOS, PAD, Tokenizer

MAX_TOKENS = 64


class TorchAnswerer:
    """Answers prompts about one picture, all prompts at once; every token is chosen under the
    true mask.
    """

    def __init__(self, model: Pico, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def answers(self, picture: Image.Image, prompts: Sequence[str]) -> list[str]:
        """One answer for each prompt."""
        pixels = to_pixels(torch.from_numpy(model_input(picture.convert("RGB"))[None]))
        rows = self.model.image_rows(self.model.features(pixels))
        texts = [self.tokenizer.prompt_ids(prompt) for prompt in prompts]
        lengths = [len(ids) for ids in texts]
        going = list(range(len(texts)))
        for _ in range(MAX_TOKENS):
            chosen = self._next([texts[k] for k in going], [lengths[k] for k in going], rows)
            for k, token in zip(going, chosen, strict=True):
                texts[k].append(token)
            going = [k for k, token in zip(going, chosen, strict=True) if token != EOS]
            if not going:
                break
        return [self.tokenizer.text(ids[n:]) for ids, n in zip(texts, lengths, strict=True)]

    def _next(self, texts: list[list[int]], lengths: list[int], rows: torch.Tensor) -> list[int]:
        p = rows.shape[1]
        t = max(len(ids) for ids in texts)
        ids = np.full((len(texts), t), PAD)
        segment, is_prompt = np.full(ids.shape, -1), np.zeros(ids.shape, bool)
        for k, text in enumerate(texts):
            ids[k, : len(text)] = text
            segment[k, : len(text)] = 0
            is_prompt[k, : lengths[k]] = True
        mask = torch.from_numpy(attention_mask(segment, is_prompt, p, image_sees_prompt=True))
        positions = torch.arange(p, p + t).expand(len(texts), -1)
        states = self.model.hidden(
            rows.expand(len(texts), -1, -1), torch.from_numpy(ids), positions, mask
        )
        last = torch.tensor([len(text) - 1 for text in texts])
        logits = self.model.logits(states[torch.arange(len(texts)), last])
        return [int(token) for token in logits.argmax(1)]
