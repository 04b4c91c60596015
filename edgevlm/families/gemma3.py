"""Gemma 3: SigLIP, means of its patches, a Gemma 3 decoder in which a picture sees all of itself.

MedGemma and other models of its shape are read as well. Facts from transformers 4.57
(models/gemma3) and the published chat template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm.family import (
    Config,
    Family,
    FileError,
    Model,
    Source,
    decoder_spec,
    locating,
    read_config,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image_specs import check_rows, image_spec
from edgevlm.parts.gemma3 import Gemma3
from edgevlm.parts.pooled import Pooled
from edgevlm.parts.siglip import SIGLIP_TOWER, SiglipTower
from edgevlm.processors import GEMMA3, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec
from edgevlm.templates import IMAGE, SYSTEM, Cutter, chat_template

_GELU = "gelu_pytorch_tanh"
# Defaults of Gemma3TextConfig, which config.json omits.
_TEXT = Gemma3(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=262208,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    query_pre_attn_scalar=256.0,
    sliding_window=4096,
    rope_local_base_freq=10000.0,
)
# What text_config may say of no other value, with what it says where it is silent.
_ONLY: Mapping[str, object] = {
    "attention_bias": False,
    "hidden_activation": _GELU,
    "attn_logit_softcapping": None,
    # transformers' class for pictures never applies it, llama.cpp would.
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_BEGIN, _END, _SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
_TURN, _TURN_END = "<start_of_turn>", "<end_of_turn>"
_EOS = 1
# transformers sets no bound; the context does.
_MAX_PICTURES = 64
_TEMPLATES = ("chat", "plain")


def _describe(source: Source) -> Model:
    if source.fit:
        raise ValueError("Gemma 3 has one fit of pictures, there is nothing to choose from")
    config = source.files["config.json"]
    vision, text = _vision(config), _text(section(config, "text_config"))
    projector = Pooled(
        in_features=vision.hidden_size,
        out_features=text.hidden_size,
        factor=_factor(config, vision),
        norm_eps=vision.layer_norm_eps,
    )
    tokens = projector.tokens(vision.rows)
    if text.sliding_window < tokens:
        raise ValueError(
            f"text_config.sliding_window is {text.sliding_window}, less than the {tokens} image "
            "embeddings of a picture, which all see one another"
        )
    ids = _token_ids(source, config)
    image, image_notes = _image(source, vision, tokens)
    prompt, prompt_notes = _prompt(source, ids)
    ends = stop_tokens(source.files, section(config, "text_config"), _EOS)
    return Model(
        image=image,
        prompt=prompt,
        decoder=decoder_spec(text, "blocks"),
        answer=AnswerSpec(
            stop_tokens=tuple(dict.fromkeys((*ends, ids[_TURN_END]))), max_tokens=512
        ),
        vision=vision,
        projector=projector,
        text=text,
        markers={ids[_SOFT]: _SOFT},
        notes=(*image_notes, *prompt_notes),
    )


def _vision(config: Config) -> SiglipTower:
    stated = section(config, "vision_config")
    if not stated:
        raise ValueError(
            "vision_config is not there: without its vision tower a Gemma 3 sees no pictures"
        )
    vision = read_config(SIGLIP_TOWER, stated, "vision_config.")
    if vision.num_channels != 3 or vision.image_size % vision.patch_size:
        raise ValueError(
            f"vision_config has {vision.num_channels} channels and {vision.image_size} pixels in "
            f"patches of {vision.patch_size}; only 3 and whole patches are known"
        )
    return vision


def _factor(config: Config, vision: SiglipTower) -> int:
    """Side of the squares of neighbouring rows whose means are taken."""
    tokens = setting(config, "mm_tokens_per_image", 256)
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens or vision.grid % side:
        raise ValueError(
            f"mm_tokens_per_image is {tokens}; only the square of a number that divides the "
            f"tower's grid of {vision.grid} is known"
        )
    return vision.grid // side


def _text(config: Config) -> Gemma3:
    """The decoder; raises ValueError for what would be converted into another one."""
    kind = setting(config, "model_type", "gemma3_text")
    if kind != "gemma3_text":
        raise ValueError(f"text_config.model_type is {kind!r}; only 'gemma3_text' is known")
    for key, known in _ONLY.items():
        if (value := config.get(key, known)) != known or type(value) is not type(known):
            raise ValueError(f"text_config.{key} is {value!r}; only {known!r} is known")
    text = read_config(_TEXT, config, "text_config.")
    rope, local = _ropes(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "linear"):
        raise ValueError(f"text_config scales its positions by {scaling!r}; only linear is known")
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"text_config scales the positions of its windows ({dict(local)})")
    return replace(
        text,
        rope_theta=setting(rope, "rope_theta", text.rope_theta),
        rope_local_base_freq=setting(local, "rope_theta", text.rope_local_base_freq),
        rope_factor=setting(rope, "factor", 1.0) if scaling == "linear" else 1.0,
        everywhere=_everywhere(config, text.num_hidden_layers),
    )


def _ropes(config: Config) -> tuple[Config, Config]:
    """Settings of the positions in layers that see everything and in those with a window, where
    transformers 4 or 5 writes them.
    """
    if found := section(config, "rope_parameters"):
        if not {_GLOBAL, _LOCAL} <= found.keys():
            raise ValueError(
                f"text_config.rope_parameters has {', '.join(found)}; only {_GLOBAL} and {_LOCAL} "
                "are known"
            )
        return section(found, _GLOBAL), section(found, _LOCAL)
    return section(config, "rope_scaling"), {}


def _everywhere(config: Config, layers: int) -> tuple[bool, ...]:
    """True for each layer that sees all positions before it."""
    kinds: list[Any] | None = config.get("layer_types")
    if kinds is None:
        every = setting(config, "sliding_window_pattern", 6)
        if every < 1:
            raise ValueError(f"text_config.sliding_window_pattern is {every}; 1 is the least")
        return tuple((i + 1) % every == 0 for i in range(layers))
    if len(kinds) != layers or any(kind not in (_LOCAL, _GLOBAL) for kind in kinds):
        raise ValueError(
            f"text_config.layer_types is {kinds!r}; only {layers} times {_LOCAL} or {_GLOBAL} is "
            "known"
        )
    return tuple(kind == _GLOBAL for kind in kinds)


def _token_ids(source: Source, config: Config) -> dict[str, int]:
    """The ids of the tokens that a prompt needs."""
    added = source.tokenizer.added
    texts = (_BEGIN, _END, _SOFT, _TURN, _TURN_END)
    if lacking := next((text for text in texts if text not in added), None):
        raise ValueError(f"the tokenizer lacks {lacking}")
    ids = {text: added[text].id for text in texts}
    for text, name, default in (
        (_BEGIN, "boi_token", 255999),
        (_END, "eoi_token", 256000),
        (_SOFT, "image_token", 262144),
    ):
        # transformers 5 may rename the keys.
        stated = setting(config, f"{name}_index", setting(config, f"{name}_id", default))
        if stated != ids[text]:
            raise ValueError(f"{name}_index is {stated}, but {text} has the id {ids[text]}")
    return ids


def _image(source: Source, vision: SiglipTower, tokens: int) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec, and a note where no file of the checkpoint states it."""
    side, notes = vision.image_size, tuple[str, ...]()
    check_rows(source.files, side, tokens)
    found = find_settings(source.files, GEMMA3, (GEMMA3,))
    if found is None:
        found, notes = default_settings(GEMMA3, side)
    return image_spec(found, side, tokens, max_pictures=_MAX_PICTURES), notes


def _prompt(source: Source, ids: Mapping[str, int]) -> tuple[PromptSpec, tuple[str, ...]]:
    """The layout of prompts, and a note where nothing chose it.

    A picture stands between blank lines, which are tokenized with the text around them.
    """
    chosen, notes = _template(source)
    # Runs of newlines are tokens, too; where there are two in a row they are the longer run's.
    added = {text: source.tokenizer.added[text] for text in ids}
    cutter = Cutter(replace(source.tokenizer, added=added), "none", ids[_TURN_END])
    begin = ("{bos}",) if source.tokenizer.add_bos or chosen == "chat" else ()
    asked = f"{IMAGE}{{prompt}}"

    def turn(system: str = "") -> str:
        return f"{_TURN}user\n{system}{asked}{_TURN_END}\n{_TURN}model\n"

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text, goes_on=True)

    chat = chosen == "chat"
    picture = ("\n\n", _BEGIN, "{image}", _END, "\n\n")
    return PromptSpec(
        template=(*begin, *cut(turn() if chat else asked)),
        turn=cut(f"{_TURN_END}\n{turn()}") if chat else (),
        system_template=(*begin, *cut(turn(f"{SYSTEM}\n\n"))) if chat else (),
        tasks={
            "caption": "Describe this image.",
            "ocr": "Write down the text in this image, and nothing else.",
        },
        joined=True,
        picture=PictureLayout(
            whole=picture,
            overview=(
                "Here is the original image ",
                *picture,
                " and here are some crops to help you see better",
            ),
            tile=(" ", *picture),
            tokens={text: ids[text] for text in (_BEGIN, _END)},
        ),
        trim=chat,
    ), notes


def _template(source: Source) -> tuple[str, tuple[str, ...]]:
    """The template's name, and a note where neither the user nor a file chose it."""
    if source.template:
        if source.template not in _TEMPLATES:
            known = ", ".join(_TEMPLATES)
            raise ValueError(f"the template {source.template!r} is not one of {known}")
        return source.template, ()
    if stated := chat_template(source.files, "tokenizer_config.json"):
        name, text = stated
        if f"'{_TURN}'" not in text and f'"{_TURN}"' not in text:
            raise FileError(
                name, f"its chat_template is not Gemma's; name a template: {', '.join(_TEMPLATES)}"
            )
        return "chat", ()
    return "plain", (
        "no chat_template: questions go to the model as they are; --template chat writes turns",
    )


# The layouts of transformers up to 4.51, from 4.52, and from 5.0.
_PARTS = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), "vision."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "projector."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)"), "decoder."),
)
_UNUSED = re.compile(
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(?:head\..+|embeddings\.position_ids)"
    r"|.+\.rotary_emb(?:_local)?\.inv_freq"
)


FAMILY = Family(
    name="gemma3",
    license="gemma",
    model_types=("gemma3",),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
    refused={
        "gemma3_text": "a Gemma 3 that reads text alone (270M, 1B); name one that sees pictures, "
        "such as google/gemma-3-4b-it",
        "gemma3n": "Gemma 3n, whose vision tower and decoder are others than Gemma 3's and not "
        "known; name a Gemma 3, such as google/gemma-3-4b-it",
    },
)
