"""SmolVLM and Idefics3, run by transformers in float32 with eager attention."""

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


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._folder = job.checkpoint.folder
        # SmolVLM's own processor differs in videos alone, for which it wants another package.
        config = _config(self._folder)
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        with quiet():
            self._processor = _hf.Idefics3Processor(
                files.picture_processor(self._folder, "Idefics3ImageProcessor"),
                files.tokenizer(self._folder),
                image_seq_len=(side // patch // config.scale_factor) ** 2,
            )

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            inputs = self._processor(
                images=request.image, text=self._prompt(request.prompt), return_tensors="pt"
            )
            pixels = inputs["pixel_values"][0]
            features = model.model.vision_model(pixels).last_hidden_state
            embeddings = model.model.connector(features)
            ids = inputs["input_ids"]
            rows = model.get_input_embeddings()(ids)
            rows[ids == model.config.image_token_id] = embeddings.flatten(0, 1)
            logits = _logits(model, rows, tokens)
        text = ids[ids != model.config.image_token_id]
        return {
            "pixels": pixels.numpy(),
            "features": features.numpy(),
            "embeddings": embeddings.numpy(),
            "prompt_ids": text.numpy().astype(np.int32),
            "logits": logits,
        }

    def _prompt(self, question: str) -> str:
        """The published chat template, which opens as the decoder's own tokenizer does."""
        known = self._processor.tokenizer.get_vocab()
        opening = "<|im_start|>" if "<|im_start|>" in known else "<|begin_of_text|>"
        return f"{opening}User:<image>{question}<end_of_utterance>\nAssistant:"


def load(folder: Path) -> Any:
    """The model, with the patches of a tile in their order: releases 4.55 to 4.57 count them
    wrongly in float32 (transformers#41190).
    """
    model = files.model("AutoModelForImageTextToText", folder, _config(folder))
    tower = model.model.vision_model
    embeddings = tower.embeddings

    def embedded(pixel_values: Any, patch_attention_mask: Any = None) -> Any:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + embeddings.position_embedding(torch.arange(patches.shape[1]))

    embeddings.forward = embedded
    return model


def _config(folder: Path) -> Any:
    config = _hf.AutoConfig.from_pretrained(folder)
    text = config.text_config
    files.set_rotary(text)
    # Top-level ids of other tables are left over in published files; no row of a prompt is padded.
    text.pad_token_id = config.pad_token_id = None
    # Either place ties the tables in some release.
    tied = text.tie_word_embeddings or config.tie_word_embeddings
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    return config


def _logits(model: Any, rows: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    cache = _hf.DynamicCache(config=model.config.text_config)
    decoder = model.model.text_model
    found = []
    hidden = decoder(inputs_embeds=rows, past_key_values=cache, use_cache=True).last_hidden_state
    found.append(model.lm_head(hidden[0, -1]).numpy())
    for token in tokens:
        step = torch.tensor([[int(token)]])
        hidden = decoder(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state
        found.append(model.lm_head(hidden[0, -1]).numpy())
    return np.stack(found)
