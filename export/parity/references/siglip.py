"""SigLIP as transformers runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import clip, files

_hf: Any = transformers


class Reference(clip.Reference):
    """See parity.dual.DualSource."""

    kind = "SiglipModel"
    processor = "SiglipImageProcessor"

    def _processor(self, folder: Path, side: int) -> Any:
        if files.has_processor(folder):
            return files.picture_processor(folder, self.processor)
        return getattr(_hf, self.processor)(size={"height": side, "width": side})

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See DualSource; SigLIP 2 was trained on lower case, which its tokenizer does not make."""
        lower = self.spec.clean == "lower"
        given = [text.lower() for text in texts] if lower else list(texts)
        length = self.spec.tokens
        with quiet():
            return [
                self.tokenizer(text, padding="max_length", truncation=True, max_length=length)[
                    "input_ids"
                ]
                for text in given
            ]

    def score(self, cosine: float) -> float:
        """See DualSource."""
        return super().score(cosine) + float(self.model.logit_bias.item())
