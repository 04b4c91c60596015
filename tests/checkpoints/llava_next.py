"""Tiny random checkpoints of LLaVA-NeXT, in transformers' layout and in LLaVA's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints.llava import MEAN, STD, write_llava
from tests.checkpoints.vocabulary import write_json

SIZE = 32
# Heights and widths in tiles, as transformers' published files have them; widths first as LLaVA's.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[a * SIZE, b * SIZE] for a, b in GRIDS]
SMALL: dict[str, Any] = {"size": SIZE, "newline": True}


def write_next(
    folder: Path,
    *,
    layout: str = "hf",
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    nested: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Writes a checkpoint; `config`, `processor` and `nested` override keys of config.json,
    preprocessor_config.json and processor_config.json, `options` are llava.Tiny's.
    """
    more: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": PINPOINTS,
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
    }
    if layout == "own":
        more = {
            "image_aspect_ratio": "anyres",
            "image_crop_resolution": 224,
            "image_grid_pinpoints": PINPOINTS,
            "mm_patch_merge_type": "spatial_unpad",
            "unfreeze_mm_vision_tower": True,
        }
        options = {"model_type": "llava_llama", "projector": "mlp2x_gelu", **options}
    write_llava(folder, layout=layout, config={**more, **(config or {})}, **{**SMALL, **options})
    if layout == "own":
        return folder
    write_json(
        folder / "preprocessor_config.json",
        {
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": SIZE, "width": SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": PINPOINTS,
            "image_mean": MEAN,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": SIZE},
            **(processor or {}),
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 4,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
            **(nested or {}),
        },
    )
    return folder
