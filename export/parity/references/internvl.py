"""InternVL run in float32 with eager attention: transformers' layout by transformers, the original
one by internvl_chat.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import EngineMissing
from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, SourceModel

try:
    import torch
    import transformers

    from edgevlm.export.parity.references import causal, files
    from edgevlm.export.parity.references.internvl_chat import ChatModel
except ImportError as e:
    raise EngineMissing(
        f"verification needs torch and transformers ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

# transformers leaves its classes without types.
_hf: Any = transformers
IMAGE = "<IMG_CONTEXT>"


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        checkpoint = job.checkpoint
        own = checkpoint.configs["config.json"]["model_type"] == "internvl_chat"
        self._model: SourceModel = (
            ChatModel(checkpoint.folder, checkpoint.tensors, job.options.template)
            if own
            else HfModel(checkpoint.folder)
        )

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return self._model.token_ids(texts, plain=plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        return self._model.run(request, tokens)


class HfModel:
    """The model of a folder in transformers' layout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with quiet():
            self._processor = processor(folder)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            inputs = self._processor(
                images=[request.image],
                text=prompt(self._processor, request.prompt),
                return_tensors="pt",
            )
            pixels, ids = inputs["pixel_values"], inputs["input_ids"][0]
            seen = causal.Seen(
                pixels,
                model.model.vision_tower(pixels).last_hidden_state[:, 1:],
                model.get_image_features(pixel_values=pixels),
            )
            places = (ids == model.config.image_token_id).nonzero().flatten().tolist()
            around = ids[: places[0]].tolist(), ids[places[-1] + 1 :].tolist()
            rows = seen._replace(embeddings=seen.embeddings.flatten(0, 1)[None])
            found = causal.stages(rows, model, around, tokens)
        return found | {"embeddings": seen.embeddings.numpy()}


class _Processor(_hf.InternVLProcessor):  # type: ignore[misc]
    """InternVL's processor of pictures without that of videos, for which it wants torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
        """Takes none for the processor of videos."""
        if name != "video_processor":
            super().check_argument_for_proper_class(name, argument)


def processor(folder: Path) -> Any:
    """The processor of a folder, with the slow one of pictures and the folder's chat template."""
    sizes = files.processor_settings(folder)
    text = files.tokenizer(folder)
    return _Processor(
        files.picture_processor(folder, "GotOcr2ImageProcessor"),
        text,
        image_seq_length=sizes.get("image_seq_length", 256),
        chat_template=files.chat_template(folder) or text.chat_template,
    )


def prompt(processor: Any, question: str) -> str:
    """A question about a picture as the chat template writes it, as the published one where the
    folder has none.
    """
    if processor.chat_template is None:
        user, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        return f"{user}{IMAGE}\n{question}{end}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    # Templates of before transformers 4.53 have the name of an earlier release.
    return str(written).replace("<image>", IMAGE, 1)


def load(folder: Path) -> Any:
    """The model in float32."""
    model = files.model("InternVLForConditionalGeneration", folder, _config(folder))
    return model


def _config(folder: Path) -> Any:
    config = _hf.InternVLConfig.from_pretrained(folder)
    files.set_rotary(config.text_config)
    return config
