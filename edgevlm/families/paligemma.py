"""PaliGemma 1 and 2: SigLIP encoder, linear projector, Gemma 1 or Gemma 2 decoder, prefix-LM.

Facts from google-research/big_vision (proj/paligemma) and transformers 4.57 (models/paligemma).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgevlm.boxes import parse_loc
from edgevlm.family import (
    Config,
    Family,
    Model,
    Source,
    place,
    rope_parameters,
    stop_tokens,
)
from edgevlm.processors import SIGLIP, check_rows, default_settings, find_settings, image_spec
from edgevlm.specs import AnswerSpec, DecoderSpec, ImageSpec, PromptSpec

# config.json omits what equals transformers' defaults for SiglipVisionConfig, GemmaConfig and
# Gemma2Config; these are those defaults (4.57), for the keys that an exporter needs.
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_GEMMA: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "eos_token_id": 1,
}
_GEMMA2: dict[str, Any] = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
}
_TEXT = {"gemma": _GEMMA, "gemma2": _GEMMA2}
# big_vision's transfers go up to 16 pictures (video frames); transformers sets no bound.
_MAX_PICTURES = 16
# transformers' processor adds these to whatever tokenizer the checkpoint has.
_LOCATIONS = tuple(f"<loc{i:04}>" for i in range(1024))
_SEGMENTS = tuple(f"<seg{i:03}>" for i in range(128))


def _describe(source: Source) -> Model:
    if source.template or source.fit:
        raise ValueError("PaliGemma has one prompt template and one fit of pictures to choose from")
    files = source.files
    config = files["config.json"]
    vision = _VISION | dict(config.get("vision_config", {}))
    kind = config.get("text_config", {}).get("model_type", "gemma")
    if kind not in _TEXT:
        raise ValueError(f"text_config.model_type {kind!r} is not one of {', '.join(_TEXT)}")
    text = _TEXT[kind] | dict(config.get("text_config", {}))
    rope = rope_parameters(config.get("text_config", {}))
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"text_config scales its positions ({dict(rope)}); no PaliGemma does")
    text["rope_theta"] = float(rope.get("rope_theta") or text["rope_theta"])
    _check(vision, text)
    side = vision["image_size"] // vision["patch_size"]
    image, notes = _image(files, vision, side * side)
    return Model(
        image=image,
        prompt=PromptSpec(
            template=("{image}", "{bos}", "{prompt}\n"),
            tasks={
                "caption": "caption {language}",
                "answer": "answer {language} {prompt}",
                "detect": "detect {prompt}",
                "ocr": "ocr",
            },
        ),
        decoder=DecoderSpec(
            architecture=kind,
            attention="prefix",
            n_embd=text["hidden_size"],
            n_layer=text["num_hidden_layers"],
            n_vocab=text["vocab_size"],
            context_length=text["max_position_embeddings"],
        ),
        answer=AnswerSpec(stop_tokens=stop_tokens(files, text["eos_token_id"])),
        vision={"kind": "siglip", **vision},
        projector={
            "kind": "linear",
            "in": vision["hidden_size"],
            "out": text["hidden_size"],
            # llama.cpp's gemma graphs multiply every row by sqrt(width), transformers' only text.
            "scale": text["hidden_size"] ** -0.5,
        },
        text={"kind": kind, **text},
        markers={_image_token(config): "<image>"},
        whole_tokens=_LOCATIONS + _SEGMENTS,
        notes=notes,
    )


def _check(vision: Config, text: Config) -> None:
    """Refuses what the exporters would convert without a word into a model that answers garbage."""
    expected = (
        ("vision_config.num_channels", vision["num_channels"], 3),
        ("text_config.attention_bias", text["attention_bias"], False),
    )
    for key, found, known in expected:
        if found != known:
            raise ValueError(f"{key} is {found!r}; only {known!r} is known")
    # Gemma checkpoints say "gelu" in hidden_act and mean the tanh form; hidden_activation wins.
    act = text["hidden_activation"] or "gelu_pytorch_tanh"
    if act != "gelu_pytorch_tanh":
        raise ValueError(
            f"text_config.hidden_activation is {act!r}; only gelu_pytorch_tanh is known"
        )
    if vision["image_size"] % vision["patch_size"]:
        raise ValueError(
            f"vision_config.image_size {vision['image_size']} is not a multiple of "
            f"patch_size {vision['patch_size']}"
        )


def _image(
    files: Mapping[str, Config], vision: Config, tokens: int
) -> tuple[ImageSpec, tuple[str, ...]]:
    """How pictures are read, and a note where no file of the checkpoint says it."""
    side = vision["image_size"]
    check_rows(files, side, tokens)
    notes: tuple[str, ...] = ()
    found = find_settings(files, SIGLIP, (SIGLIP,))
    if found is None:
        found, notes = default_settings(SIGLIP, side)
    return image_spec(found, side, tokens, max_pictures=_MAX_PICTURES), notes


def _image_token(config: Config) -> int:
    # transformers 5 renames the key; 256000 is its default in every version.
    return int(config.get("image_token_index", config.get("image_token_id", 256000)))


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


def _locate(name: str) -> str | None:
    return place(name, _PARTS, _UNUSED)


FAMILY = Family(
    name="paligemma",
    license="gemma",
    model_types=("paligemma",),
    describe=_describe,
    locate=_locate,
    boxes=parse_loc,
)
