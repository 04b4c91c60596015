"""The original: transformers' PaliGemma in float32, eager, fed as its processor feeds it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

Float = npt.NDArray[np.float32]


class Original:
    """A checkpoint in transformers."""

    def __init__(self, checkpoint: Path) -> None:
        torch = pytest.importorskip("torch", reason="the original runs in torch")
        from transformers import PaliGemmaForConditionalGeneration

        self._torch = torch
        self._model = PaliGemmaForConditionalGeneration.from_pretrained(
            checkpoint, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def logits(self, pixels: Float, prompt_ids: list[int], answer: list[int]) -> Float:
        """Logits float32 [1 + len(answer), n_vocab]: after the prefix, then after each token.

        `pixels` is [n, 3, size, size]; n may be 0. The prefix attends both ways (token type 0).
        """
        torch, model = self._torch, self._model
        vision = model.config.vision_config
        rows = len(pixels) * (vision.image_size // vision.patch_size) ** 2
        prefix = torch.tensor([[model.config.image_token_index] * rows + list(prompt_ids)])
        with torch.no_grad():
            out = model(
                input_ids=prefix,
                pixel_values=torch.tensor(pixels) if len(pixels) else None,
                token_type_ids=torch.zeros_like(prefix),
                attention_mask=torch.ones_like(prefix),
                use_cache=True,
            )
            found = [out.logits[0, -1]]
            for i, token in enumerate(answer):
                n = prefix.shape[1] + i
                out = model(
                    input_ids=torch.tensor([[token]]),
                    past_key_values=out.past_key_values,
                    attention_mask=torch.ones(1, n + 1),
                    cache_position=torch.tensor([n]),
                    use_cache=True,
                )
                found.append(out.logits[0, -1])
        return np.asarray(torch.stack(found).numpy())

    def greedy(self, pixels: Float, prompt_ids: list[int], n: int) -> list[int]:
        """The n likeliest tokens in turn, end tokens included."""
        tokens: list[int] = []
        for _ in range(n):
            tokens.append(int(self.logits(pixels, prompt_ids, tokens)[-1].argmax()))
        return tokens
