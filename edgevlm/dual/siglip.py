"""SigLIP and SigLIP 2 of a fixed size in transformers' layout.

Facts from google-research/big_vision and transformers 4.57 (models/siglip).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from edgevlm.dual import CONFIG, TOKENIZER_CONFIG, DualFamily, DualModel, most_tokens
from edgevlm.dual.clip import picture
from edgevlm.family import (
    Config,
    Source,
    locating,
    read_config,
    section,
    setting,
)
from edgevlm.parts.map_head import MapHead
from edgevlm.parts.picture_encoder import PictureEncoder
from edgevlm.parts.siglip import SIGLIP_TOWER, SiglipTower
from edgevlm.parts.text_tower import TextTower
from edgevlm.processors import SIGLIP
from edgevlm.specs import Clean, TextSpec

# Defaults of SiglipTextConfig, which a config.json omits.
_TEXT = TextTower(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=64,
    vocab_size=32000,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    projection_bias=True,
    causal=False,
    pooled="last",
)
TEMPLATE = "this is a photo of {}."
# The length of SiglipTokenizer's texts where its file does not say.
_TOKENS = 64


def _describe(source: Source) -> DualModel:
    config = source.files[CONFIG]
    stated = section(config, "vision_config")
    if not setting(stated, "vision_use_head", True):
        raise ValueError("vision_config.vision_use_head is false; only models with it are known")
    vision = read_config(SIGLIP_TOWER, stated, "vision_config.")
    said = section(config, "text_config")
    text = read_config(_TEXT, said, "text_config.")
    width = _projection(said, text.hidden_size)
    if width != vision.hidden_size:
        raise ValueError(
            f"text_config.projection_size is {width}, a picture's row has {vision.hidden_size}"
        )
    second = _is_second(source.files)
    tokens = most_tokens(source.files, text.max_position_embeddings, None if second else _TOKENS)
    clean: Clean = "lower" if second else "siglip"
    image, notes = picture(source, vision.image_size, SIGLIP)
    return DualModel(
        image=image,
        text=TextSpec(
            tokens=tokens, width=width, scale=1.0, sigmoid=True, clean=clean, template=TEMPLATE
        ),
        vision=PictureEncoder(tower=vision, head=map_head(vision)),
        tower=replace(text, projection_dim=width, tokens=tokens),
        notes=notes,
    )


def _projection(said: Config, width: int) -> int:
    found = said.get("projection_size")
    return width if found is None else setting(said, "projection_size", width)


def _is_second(files: Mapping[str, Config]) -> bool:
    """True for SigLIP 2, whose texts are Gemma's tokens, by its tokenizer."""
    if said := files.get(TOKENIZER_CONFIG, {}).get("tokenizer_class"):
        return str(said).startswith(("Gemma", "Siglip2"))
    return section(files.get("tokenizer.json", {}), "model").get("type") == "BPE"


def map_head(vision: SiglipTower) -> MapHead:
    """The head of a tower's width."""
    return MapHead(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
    )


_PARTS = (
    (re.compile(r"vision_model\.(.+)"), "vision."),
    (re.compile(r"text_model\.(.+)"), "text."),
    (re.compile(r"(logit_(?:scale|bias))"), "score."),
)
# Stored tables of numbers.
_UNUSED = re.compile(r"(?:vision|text)_model\.embeddings\.position_ids")


FAMILY = DualFamily(
    name="siglip",
    license="Apache-2.0",
    model_types=("siglip",),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
)
