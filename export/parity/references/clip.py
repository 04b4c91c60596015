"""CLIP as transformers runs it; SigLIP's and open_clip's references are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import files
from edgevlm.specs import TextSpec

_hf: Any = transformers
Array = NDArray[Any]


class Reference:
    """See parity.dual.DualSource."""

    kind = "CLIPModel"
    processor = "CLIPImageProcessor"

    def __init__(self, folder: Path, spec: TextSpec) -> None:
        self.spec = spec
        with quiet():
            self.tokenizer = files.tokenizer(folder)
            config = _hf.AutoConfig.from_pretrained(folder)
            self.model = files.model(self.kind, folder, config)
            self.images = self._processor(folder, config.vision_config.image_size)

    def _processor(self, folder: Path, side: int) -> Any:
        if files.has_processor(folder):
            return files.picture_processor(folder, self.processor)
        square = {"height": side, "width": side}
        return getattr(_hf, self.processor)(size={"shortest_edge": side}, crop_size=square)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See DualSource."""
        with quiet():
            return [
                self.tokenizer(text, truncation=True, max_length=self.spec.tokens)["input_ids"]
                for text in texts
            ]

    def pixels(self, picture: NDArray[np.uint8]) -> Array:
        """See DualSource."""
        found: Array = self.images(picture, return_tensors="np")["pixel_values"][0]
        return found

    def pictures(self, pixels: Array) -> Array:
        """See DualSource."""
        with torch.inference_mode():
            return _unit(self.model.get_image_features(torch.from_numpy(pixels)))

    def texts(self, ids: Sequence[Sequence[int]]) -> Array:
        """See DualSource."""
        with torch.inference_mode():
            rows = [self.model.get_text_features(torch.tensor([each])) for each in ids]
            return _unit(torch.cat(rows))

    def score(self, cosine: float) -> float:
        """See DualSource."""
        return float(cosine * self.model.logit_scale.exp().item())


def _unit(rows: Any) -> Array:
    found: Array = (rows / rows.norm(dim=-1, keepdim=True)).numpy()
    return found
