"""CLIP and MetaCLIP in transformers' layout.

Facts from openai/CLIP and transformers 4.57 (models/clip).
"""

from __future__ import annotations

import re
from dataclasses import replace

from edgevlm.dual import CONFIG, DualFamily, DualModel, most_tokens
from edgevlm.family import (
    Config,
    Source,
    T,
    locating,
    read_config,
    section,
    setting,
)
from edgevlm.image_specs import image_spec
from edgevlm.parts.class_row import ClassRow
from edgevlm.parts.clip import CLIP_TOWER
from edgevlm.parts.picture_encoder import PictureEncoder
from edgevlm.parts.text_tower import TextTower
from edgevlm.processors import CLIP, SIGLIP, default_settings, find_settings
from edgevlm.specs import ImageSpec, TextSpec

# Defaults of CLIPTextConfig, which a config.json omits.
_TEXT = TextTower(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    vocab_size=49408,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_WIDTH, _END = 512, 49407
# What configs of before 4.30 say of the end token, and transformers takes for "the largest id".
_OLD_END = 2
TEMPLATE = "a photo of a {}."


def _describe(source: Source) -> DualModel:
    config = source.files[CONFIG]
    vision = replace(_part(config, "vision_config", CLIP_TOWER), class_token=True)
    width = setting(config, "projection_dim", _WIDTH)
    text, end = _part(config, "text_config", _TEXT), _end(config)
    tokens = most_tokens(source.files, text.max_position_embeddings)
    text = replace(
        text,
        projection_dim=width,
        tokens=tokens,
        pooled="largest" if end == _OLD_END else "end",
        end_id=end,
    )
    image, notes = picture(source, vision.image_size, CLIP)
    head = ClassRow(
        hidden_size=vision.hidden_size,
        layer_norm_eps=vision.layer_norm_eps,
        projection_dim=width,
    )
    return DualModel(
        image=image,
        text=TextSpec(tokens=tokens, width=width, scale=1.0, template=TEMPLATE),
        vision=PictureEncoder(tower=vision, head=head),
        tower=text,
        notes=notes,
    )


def _part(config: Config, key: str, defaults: T) -> T:
    """A side's config; where an old file has it twice transformers takes the second alone."""
    old = f"{key}_dict"
    found = section(config, old) if config.get(old) is not None else section(config, key)
    return read_config(defaults, found, f"{key}.")


def _end(config: Config) -> int:
    old = config.get("text_config_dict")
    found = section(config, "text_config_dict" if old is not None else "text_config")
    return setting(found, "eos_token_id", _END)


def picture(source: Source, side: int, default: str) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec by the files, or as the class `default` has it, with a note of that."""
    if found := find_settings(source.files, default, (CLIP, SIGLIP)):
        return image_spec(found, side, 1), ()
    found, notes = default_settings(default, side)
    return image_spec(found, side, 1), notes


_PARTS = (
    (re.compile(r"vision_model\.(.+)"), "vision."),
    (re.compile(r"visual_(projection\.weight)"), "vision."),
    (re.compile(r"text_model\.(.+)"), "text."),
    (re.compile(r"text_(projection\.weight)"), "text."),
    (re.compile(r"(logit_scale)"), "score."),
)
# Stored tables of numbers.
_UNUSED = re.compile(r"(?:vision|text)_model\.embeddings\.position_ids")


FAMILY = DualFamily(
    name="clip",
    license="unknown; see the model's page",
    model_types=("clip",),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
)
