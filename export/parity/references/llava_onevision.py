"""LLaVA-OneVision, run by transformers in float32 with eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from edgevlm.export.components import Job
from edgevlm.export.parity.references import files
from edgevlm.export.parity.references.llava_next import Transformed, pictures

# transformers leaves its classes without types.
_hf: Any = transformers


class Reference(Transformed):
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, load_processor)


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
    )


def _processor() -> Any:
    """The class, without its processor of films, which wants torchvision."""
    kind: Any = _hf.LlavaOnevisionProcessor
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
