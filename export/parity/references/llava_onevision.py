"""LLaVA-OneVision, run in float32: by transformers in its layout, in LLaVA-NeXT's part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray

from edgevlm.export.components import Job
from edgevlm.export.parity.references import Arrays, ParityRequest, SourceModel, files
from edgevlm.export.parity.references.llava_next import Own, Transformed, pictures

# transformers leaves its classes without types.
_hf: Any = transformers


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        kind = job.checkpoint.configs["config.json"]["model_type"]
        self._source: SourceModel = _Hf(job) if kind == "llava_onevision" else _Own(job)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return self._source.token_ids(texts, plain=plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        return self._source.run(request, tokens)


class _Hf(Transformed):
    """transformers' layout."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, load_processor)

    def _text(self, prompt: str) -> str:
        """The prompt as the folder's chat template writes it, unless that has none of Qwen2's turns
        or another was chosen.
        """
        chat = self._processor.chat_template or ""
        if self._job.options.template or "<|im_start|>" not in chat:
            return super()._text(prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        asked = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(asked, add_generation_prompt=True))


class _Own(Own):
    """LLaVA-NeXT's own layout."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Its texts are tokenized apart, whether or not there is a token for pictures.
        self._alone = True

    def _processor(self) -> Any:
        """llava/model/multimodal_encoder/siglip_encoder.py, SigLipImageProcessor, for a tower of
        another size.
        """
        side = self._job.model.vision.image_size
        return _hf.SiglipImageProcessor(size={"height": side, "width": side})

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        if self._job.options.template:
            return super()._around(prompt)
        # llava/conversation.py, conv_qwen.
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        chunks = f"{system}<|im_start|>user\n", f"\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        before, after = (self._tokenizer(chunk)["input_ids"] for chunk in chunks)
        return before, after


def load_processor(folder: Path) -> Any:
    """transformers' processor with its slow class for pictures, and what older files leave out."""
    config = _hf.AutoConfig.from_pretrained(folder)
    stated = files.processor_settings(folder)
    vision = config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    return _processor()(
        pictures(folder, "LlavaOnevisionImageProcessor", size=side),
        files.tokenizer(folder),
        None,
        num_image_tokens=stated.get(
            "num_image_tokens", (vision.image_size // vision.patch_size) ** 2
        ),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=files.chat_template(folder),
    )


def _processor() -> Any:
    """The class, without its processor of films, which wants torchvision."""
    kind: Any = _hf.LlavaOnevisionProcessor
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
