"""PaliGemma 1 and 2: SigLIP encoder, linear projector, Gemma 1 or Gemma 2 decoder, prefix-LM.

Facts from google-research/big_vision (proj/paligemma) and transformers 4.57 (models/paligemma).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from edgevlm.boxes import parse_loc
from edgevlm.family import (
    Config,
    Family,
    Model,
    Source,
    decoder_spec,
    locating,
    read_config,
    rope_parameters,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image_specs import check_rows, image_spec
from edgevlm.parts.gemma import Gemma
from edgevlm.parts.gemma2 import Gemma2
from edgevlm.parts.linear import Linear
from edgevlm.parts.siglip import SIGLIP_TOWER, SiglipTower
from edgevlm.processors import SIGLIP, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PromptSpec

_GELU = "gelu_pytorch_tanh"
# config.json omits what equals transformers' defaults for GemmaConfig and Gemma2Config; these are
# those defaults (4.57), for the keys that an exporter needs.
_TEXT: dict[str, Gemma | Gemma2] = {
    "gemma": Gemma(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    ),
    "gemma2": Gemma2(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        query_pre_attn_scalar=256.0,
        attn_logit_softcapping=50.0,
    ),
}
_EOS = 1
# big_vision's transfers go up to 16 pictures (video frames); transformers sets no bound.
_MAX_PICTURES = 16
# transformers' processor adds these to whatever tokenizer the checkpoint has.
_LOCATIONS = tuple(f"<loc{i:04}>" for i in range(1024))
_SEGMENTS = tuple(f"<seg{i:03}>" for i in range(128))


def _describe(source: Source) -> Model:
    if source.template or source.fit:
        raise ValueError("PaliGemma has one prompt template and one fit of pictures to choose from")
    files, config = source.files, source.files["config.json"]
    vision = read_config(SIGLIP_TOWER, section(config, "vision_config"), "vision_config.")
    if vision.num_channels != 3:
        raise ValueError(f"vision_config.num_channels is {vision.num_channels}; only 3 is known")
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"vision_config.image_size {vision.image_size} is not a multiple of "
            f"patch_size {vision.patch_size}"
        )
    text = _text(section(config, "text_config"))
    projector = Linear(
        in_features=vision.hidden_size,
        out_features=text.hidden_size,
        # llama.cpp's gemma graphs multiply every row by sqrt(width), transformers' only text.
        scale=text.hidden_size**-0.5,
    )
    image, notes = _image(files, vision, projector.tokens(vision.rows))
    return Model(
        image=image,
        prompt=PromptSpec(
            template=("{image}", "{bos}", "{prompt}\n"),
            tasks={
                "caption": "caption {language}",
                "answer": "answer {language} {prompt}",
                "detect": "detect {prompt}",
                "segment": "segment {prompt}",
                "ocr": "ocr",
            },
        ),
        decoder=decoder_spec(text, "prefix"),
        answer=AnswerSpec(stop_tokens=stop_tokens(files, section(config, "text_config"), _EOS)),
        vision=vision,
        projector=projector,
        text=text,
        markers={_image_token(config): "<image>"},
        whole_tokens=_LOCATIONS + _SEGMENTS,
        notes=notes,
    )


def _text(config: Config) -> Gemma | Gemma2:
    """The decoder; raises ValueError for what would be converted without a word into one that
    answers garbage.
    """
    kind = setting(config, "model_type", "gemma")
    if kind not in _TEXT:
        raise ValueError(f"text_config.model_type {kind!r} is not one of {', '.join(_TEXT)}")
    text = read_config(_TEXT[kind], config, "text_config.")
    rope = rope_parameters(config)
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"text_config scales its positions ({dict(rope)}); no PaliGemma does")
    if setting(config, "attention_bias", False):
        raise ValueError("text_config.attention_bias is True; only False is known")
    # Gemma checkpoints say "gelu" in hidden_act and mean the tanh form; hidden_activation wins.
    act = config.get("hidden_activation") or _GELU
    if act != _GELU:
        raise ValueError(f"text_config.hidden_activation is {act!r}; only {_GELU} is known")
    return replace(text, rope_theta=setting(rope, "rope_theta", text.rope_theta))


def _image(
    files: Mapping[str, Config], vision: SiglipTower, tokens: int
) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec, and a note where no file of the checkpoint states it."""
    side = vision.image_size
    check_rows(files, side, tokens)
    notes: tuple[str, ...] = ()
    found = find_settings(files, SIGLIP, (SIGLIP,))
    if found is None:
        found, notes = default_settings(SIGLIP, side)
    return image_spec(found, side, tokens, max_pictures=_MAX_PICTURES), notes


def _image_token(config: Config) -> int:
    # transformers 5 renames the key; 256000 is its default in every version.
    return setting(config, "image_token_index", setting(config, "image_token_id", 256000))


# The layouts of transformers up to 4.51, from 4.52, and from 5.0, in this order of parts.
_PARTS = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), "vision."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "projector."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)"), "decoder."),
)


# A pooling head that transformers makes beside some towers and PaliGemma never runs; counters and
# tables that older releases stored.
_UNUSED = re.compile(
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(?:head\..+|embeddings\.position_ids)"
    r"|.+\.rotary_emb\.inv_freq"
)


FAMILY = Family(
    name="paligemma",
    license="gemma",
    model_types=("paligemma",),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
    boxes=parse_loc,
)
