"""LLaVA-NeXT's kin in transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
