"""PaliGemma, run by transformers in float32 with eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    from transformers import (
        DynamicCache,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    from edgevlm.export.parity.references import files
    from edgevlm.export.parity.references.adapters import Added
except ImportError as e:
    raise EngineMissing(
        f"verification needs torch and transformers ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None


# Modules as releases of transformers called them when an adapter was trained, and as 4.57 does.
_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),
    (r"^multi_modal_projector", "model.multi_modal_projector"),
)


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._folder = job.checkpoint.folder
        self._adapter = job.adapter.folder if job.adapter else None
        self._processor = load_processor(self._folder)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), _without_bars(), torch.inference_mode():
            model = _load(self._folder)
            if self._adapter:
                Added(self._adapter, _NAMES).attach(model)
            inputs = self._processor(
                images=request.image, text="<image>" + request.prompt, return_tensors="pt"
            )
            # Bytes where the processor neither rescales nor normalises.
            pixels = inputs["pixel_values"].float()
            features = model.model.vision_tower(pixels).last_hidden_state
            embeddings = model.model.get_image_features(pixels)
            ids = inputs["input_ids"][0]
            logits = _logits(model, {**inputs, "pixel_values": pixels}, tokens)
        text = ids[ids != model.config.image_token_id]
        return {
            "pixels": pixels.numpy(),
            "features": features.numpy(),
            "embeddings": embeddings.numpy(),
            "prompt_ids": text.numpy().astype(np.int32),
            "logits": logits,
        }


def load_processor(folder: Path) -> Any:
    """transformers' processor for a checkpoint."""
    # transformers leaves its processors without types.
    processors: Any = PaliGemmaProcessor
    with quiet():
        vision = PaliGemmaConfig.from_pretrained(folder).vision_config
        side = {"height": vision.image_size, "width": vision.image_size}
        found = files.has_processor(folder)
        pictures: Any = (
            files.picture_processor(folder) if found else SiglipImageProcessor(size=side)
        )
        if not hasattr(pictures, "image_seq_length"):
            # Older files leave it out, and the processor wants it.
            pictures.image_seq_length = (vision.image_size // vision.patch_size) ** 2
        return processors(pictures, files.tokenizer(folder, "GemmaTokenizerFast"))


def _logits(model: Any, inputs: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    cache = DynamicCache(config=model.config.get_text_config())
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = [out.logits[0, -1].numpy()]
    mask = inputs["attention_mask"]
    for token in tokens:
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        out = model(
            input_ids=torch.tensor([[int(token)]]),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


@contextmanager
def _without_adapters() -> Iterator[None]:
    """With peft installed transformers would load an adapter's base from elsewhere and add it."""
    from transformers import modeling_utils

    # transformers leaves this name without a type.
    module: Any = modeling_utils
    found = module.is_peft_available
    module.is_peft_available = lambda: False
    try:
        yield
    finally:
        module.is_peft_available = found


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar on stderr while it loads shards."""
    from transformers import utils

    # transformers leaves its logging without types.
    logging: Any = utils.logging
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _config(folder: Path) -> Any:
    """The checkpoint's config, without the window that transformers puts on PaliGemma 2's answers.

    big_vision, which trained it, has none; it shows once a prefix is longer than 4096 (896 px).
    """
    config = PaliGemmaConfig.from_pretrained(folder)
    text: Any = config.get_text_config()
    files.set_rotary(text)
    if getattr(text, "sliding_window", None):
        text.sliding_window = text.max_position_embeddings
    return config


def _load(folder: Path) -> Any:
    # Checkpoints saved by transformers 5 lack a level that 4.57's tower still has.
    mapping = dict(PaliGemmaForConditionalGeneration._checkpoint_conversion_mapping)
    mapping[r"^model\.vision_tower\.(?!vision_model)"] = "model.vision_tower.vision_model."
    with _without_adapters():
        kind = "PaliGemmaForConditionalGeneration"
        return files.model(kind, folder, _config(folder), key_mapping=mapping)
