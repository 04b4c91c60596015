"""Gemma 3, run by transformers in float32 with eager attention."""

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
# What Gemma3Processor asks its tokenizer for.
_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._folder, self._template = job.checkpoint.folder, job.options.template
        self._processor = processor(self._folder)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            inputs = self._inputs(request)
            pixels = inputs["pixel_values"].float()
            features = model.model.vision_tower(pixels).last_hidden_state
            embeddings = model.model.get_image_features(pixels)
            logits = _logits(model, {**inputs, "pixel_values": pixels}, tokens)
        ids = inputs["input_ids"][0]
        return {
            "pixels": pixels.numpy(),
            "features": features.numpy(),
            "embeddings": embeddings.numpy(),
            "prompt_ids": ids[ids != model.config.image_token_id].numpy().astype(np.int32),
            "logits": logits,
        }

    def _inputs(self, request: ParityRequest) -> Any:
        """The question as the chosen template has it, or else in the checkpoint's chat template,
        which writes the begin token itself, or as it is.
        """
        text = f"<start_of_image>{request.prompt}"
        begins = not self._template and bool(self._processor.chat_template)
        if begins:
            content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
            turn = [{"role": "user", "content": content}]
            text = self._processor.apply_chat_template(turn, add_generation_prompt=True)
        elif self._template == "chat":
            text = f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
        return self._processor(
            images=request.image, text=text, return_tensors="pt", add_special_tokens=not begins
        )


def processor(folder: Path) -> Any:
    """transformers' processor for a checkpoint."""
    with quiet():
        config = _hf.AutoConfig.from_pretrained(folder)
        side = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
        found = files.has_processor(folder)
        pictures: Any = (
            files.picture_processor(folder, "Gemma3ImageProcessor")
            if found
            else _hf.Gemma3ImageProcessor(size=side)
        )
        tokenizer = files.tokenizer(folder)
        for name, text in _TOKENS.items():
            # A tokenizer that transformers 5 saved does not have them by these names.
            tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, name]
            tokenizer._special_tokens_map[name] = text
        return _hf.Gemma3Processor(
            pictures,
            tokenizer,
            chat_template=files.chat_template(folder) or tokenizer.chat_template,
            image_seq_length=config.mm_tokens_per_image,
        )


def load(folder: Path) -> Any:
    """The model."""
    config = _hf.AutoConfig.from_pretrained(folder)
    files.set_rotary(config.text_config)
    local = (getattr(config.text_config, "rope_parameters", None) or {}).get("sliding_attention")
    if local:
        config.text_config.rope_local_base_freq = local["rope_theta"]
    # Checkpoints saved by transformers 5 lack a level that 4.57's tower still has.
    kind = "Gemma3ForConditionalGeneration"
    mapping = dict(getattr(_hf, kind)._checkpoint_conversion_mapping)
    mapping[r"^model\.vision_tower\.(?!vision_model)"] = "model.vision_tower.vision_model."
    return files.model(kind, folder, config, key_mapping=mapping)


def _logits(model: Any, inputs: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    cache = _hf.DynamicCache(config=model.config.get_text_config())
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = [out.logits[0, -1].numpy()]
    mask = inputs["attention_mask"]
    for token in tokens:
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        step = torch.tensor([[int(token)]])
        out = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)
