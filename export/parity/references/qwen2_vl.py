"""Qwen2-VL and Qwen2.5-VL, run by transformers in float32 with eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import EngineMissing
from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest

try:
    import torch
    import transformers

    from edgevlm.export.parity.references import files
except ImportError as e:
    raise EngineMissing(
        f"verification needs torch and transformers ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

# transformers leaves its classes without types.
_hf: Any = transformers
_CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
# The published chat template, for folders without one.
_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._folder = job.checkpoint.folder
        native = job.model.image.native
        with quiet():
            self._processor = processor(self._folder, native.max_pixels if native else 0)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
            asked = [{"role": "user", "content": content}]
            text = self._processor.apply_chat_template(asked, add_generation_prompt=True)
            inputs = self._processor(images=[request.image], text=text, return_tensors="pt")
            features, embeddings = seen(model, inputs)
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens.tolist()]).long()], 1)
            given = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
            logits = model(input_ids=ids, **given).logits[0, -len(tokens) - 1 :]
        prompt = inputs["input_ids"]
        return {
            "pixels": pixels(inputs, model.config.vision_config),
            "features": features,
            "embeddings": embeddings,
            "prompt_ids": prompt[prompt != model.config.image_token_id].numpy().astype(np.int32),
            "logits": logits.numpy(),
        }


def seen(model: Any, inputs: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features [1, patches, width] of one picture, in the order of the connector's rows, and
    embeddings [1, rows, n_embd].
    """
    tower, grid = model.model.visual, inputs["image_grid_thw"]
    heard: list[Any] = []
    hook = tower.merger.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    try:
        embeddings = tower(inputs["pixel_values"], grid_thw=grid)
    finally:
        hook.remove()
    features = heard[0]
    if hasattr(tower, "get_window_index"):
        # Its rows go window by window up to the end of the connector.
        order = torch.argsort(tower.get_window_index(grid)[0])
        squares = features.reshape(len(order), -1, features.shape[-1])
        features = squares[order].flatten(0, 1)
    return features[None].numpy(), embeddings[None].numpy()


def pixels(inputs: Any, vision: Any) -> NDArray[np.float32]:
    """The pixels [1, 3, height, width] of one picture, whose patches the processor lists."""
    _, lines, columns = inputs["image_grid_thw"][0].tolist()
    merge, side = vision.spatial_merge_size, vision.patch_size
    frames: NDArray[np.float32] = (
        inputs["pixel_values"]
        .reshape(lines // merge, columns // merge, merge, merge, 3, -1, side, side)
        .permute(5, 4, 0, 2, 6, 1, 3, 7)
        .reshape(-1, 3, lines * side, columns * side)
        .numpy()
    )
    assert (frames == frames[:1]).all(), "a still picture"
    return frames[:1]


class _Processor(_hf.Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2-VL's processor, which is Qwen2.5-VL's for pictures, without that of videos, for which
    it wants torchvision.
    """

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
        """Takes none for the processor of videos."""
        if name != "video_processor":
            super().check_argument_for_proper_class(name, argument)


def processor(folder: Path, max_pixels: int = 0) -> Any:
    """The processor of a folder, with the slow one of pictures; `max_pixels` bounds a picture
    further.
    """
    pictures = files.picture_processor(folder, "Qwen2VLImageProcessor")
    stated = files.picture_settings(folder).get("size")
    if stated:
        # This class reads it where it is given for a picture, and not from its file.
        pictures.min_pixels, pictures.max_pixels = stated["shortest_edge"], stated["longest_edge"]
    pictures.max_pixels = min(max_pixels or pictures.max_pixels, pictures.max_pixels)
    text = files.tokenizer(folder)
    chat = files.chat_template(folder) or text.chat_template or _CHAT
    return _Processor(pictures, text, chat_template=chat)


def load(folder: Path) -> Any:
    """The model in float32."""
    config = _hf.AutoConfig.from_pretrained(folder)
    files.set_rotary(config.text_config)
    name = _CLASSES[config.model_type]
    return files.model(f"{name}ForConditionalGeneration", folder, config)
