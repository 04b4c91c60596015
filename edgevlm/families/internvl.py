"""InternVL 1.5 to 3 with InternViT-300M: tiles by the picture's shape, pixel shuffle, Qwen2 or
InternLM2.

In the original layout (`internvl_chat`) and in transformers' (`internvl`). Facts from
OpenGVLab/InternVL (internvl_chat/internvl) and transformers 4.57 (internvl, got_ocr2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edgevlm import decoders
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
from edgevlm.parts.internvit import InternVit
from edgevlm.parts.llama import Llama
from edgevlm.parts.merged_mlp import MergedMlp
from edgevlm.processors import GOT_OCR2, PREPROCESSOR, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec, TileSpec
from edgevlm.templates import SYSTEM, Cutter, chat_template

_OWN = "internvl_chat"
# Defaults of InternVLVisionConfig, and of InternVisionConfig, which are the 6B's.
_VISION = InternVit(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_channels=3,
    image_size=448,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    attention_bias=False,
)
_OWN_VISION = replace(
    _VISION,
    hidden_size=3200,
    intermediate_size=12800,
    num_hidden_layers=48,
    num_attention_heads=25,
    image_size=224,
)
# What a config may say of no other value, with what it says where it is silent.
_ONLY: dict[str, tuple[object, object]] = {
    "vision_feature_layer": (-1, -1),
    "vision_feature_select_strategy": ("default", "default"),
    "projector_hidden_act": ("gelu", "gelu"),
}
_OWN_ONLY: dict[str, tuple[object, object]] = {
    "select_layer": (-1, -1),
    "ps_version": ("v2", "v1"),  # v1 leaves the map transposed
    "pad2square": (False, False),
    "use_backbone_lora": (0, 0),  # whose files may hold adapters that are not merged
    "use_llm_lora": (0, 0),
}
_VISION_ONLY: dict[str, tuple[object, object]] = {
    "use_qk_norm": (False, False),
    "norm_type": ("layer_norm", "layer_norm"),
    "use_mask_token": (False, False),
    "use_absolute_position_embeddings": (True, True),
    "use_mean_pooling": (True, True),  # or else there is a norm after the last layer
    "hidden_act": ("gelu", "gelu"),
}
_OWN_VISION_ONLY: dict[str, tuple[object, object]] = {
    "qk_normalization": (False, True),
    "norm_type": ("layer_norm", "rms_norm"),
    "hidden_act": ("gelu", "gelu"),
}
_START, _END, _CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
_TURN, _TURN_END = "<|im_start|>", "<|im_end|>"
_TOKENS = (_START, _END, _CONTEXT, _TURN, _TURN_END)
# The names that transformers' processor asks the tokenizer's config for.
_NAMED = {
    "start_image_token": _START,
    "end_image_token": _END,
    "context_image_token": _CONTEXT,
}
# internvl/train/constants.py, IMAGENET_MEAN and IMAGENET_STD.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# No original sets a bound; the context does.
_MAX_PICTURES = 64


def _describe(source: Source) -> Model:
    if source.fit:
        raise ValueError("InternVL has one fit of pictures, there is nothing to choose from")
    config = source.files["config.json"]
    own = config["model_type"] == _OWN
    _check(config, _OWN_ONLY if own else _ONLY)
    vision = _vision(config, own)
    text, stated = _own_text(config) if own else _text(source, config)
    projector = MergedMlp(
        in_features=vision.hidden_size,
        out_features=text.hidden_size,
        factor=_factor(config, vision),
    )
    tokens = projector.tokens(vision.rows)
    ids = _token_ids(source)
    template = _own_template(source, config) if own else _template(source)
    ends = (ids[_TURN_END], *stop_tokens(source.files, stated, ids[_TURN_END]))
    return Model(
        image=_own_image(config, vision, tokens) if own else _image(source, vision, tokens),
        prompt=_prompt(source, template, ids, own),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(stop_tokens=tuple(dict.fromkeys(ends)), max_tokens=512, strip=own),
        vision=vision,
        projector=projector,
        text=text,
        markers={ids[_CONTEXT]: _CONTEXT},
    )


def _check(config: Config, only: dict[str, tuple[object, object]], where: str = "") -> None:
    for key, (known, default) in only.items():
        value = config.get(key, default)
        if value != known or type(value) is not type(known):
            raise ValueError(f"{where}{key} is {value!r}; only {known!r} is known")


def _factor(config: Config, vision: InternVit) -> int:
    """Side of the squares of neighbouring rows that become one."""
    ratio = setting(config, "downsample_ratio", 0.5)
    factor = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not factor or 1 / ratio != factor or vision.grid % factor:
        raise ValueError(
            f"downsample_ratio is {ratio}; only the inverse of a number that divides the tower's "
            f"grid of {vision.grid} is known"
        )
    return factor


def _vision(config: Config, own: bool) -> InternVit:
    found = dict(section(config, "vision_config"))
    _check(found, _OWN_VISION_ONLY if own else _VISION_ONLY, "vision_config.")
    if own and "qkv_bias" in found:
        found["attention_bias"] = found["qkv_bias"]
    for key in ("image_size", "patch_size"):
        side = found.get(key)
        if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
            found[key] = side[0]
    vision = read_config(_OWN_VISION if own else _VISION, found, "vision_config.")
    if vision.num_channels != 3 or vision.image_size % vision.patch_size:
        raise ValueError(
            f"vision_config has {vision.num_channels} channels and {vision.image_size} pixels in "
            f"patches of {vision.patch_size}; only 3 and whole patches are known"
        )
    size = config.get("force_image_size") if own else None
    if size is not None and size != vision.image_size:
        raise ValueError(
            f"force_image_size is {size!r}; only vision_config.image_size ({vision.image_size}), "
            "which the positions are stored for, is known"
        )
    return vision


def _text(source: Source, config: Config) -> tuple[Llama, Config]:
    """The decoder in transformers' layout, and its config."""
    stated = section(config, "text_config")
    return decoders.with_tables(decoders.read(stated, "qwen2"), source, stated), stated


def _own_text(config: Config) -> tuple[Llama, Config]:
    """The decoder in the original layout, and its config."""
    stated = section(config, "llm_config")
    kinds: list[object] = setting(stated, "architectures", [])
    kind = _ARCHITECTURES.get(str(kinds[0])) if kinds else None
    if kind is None:
        raise ValueError(
            f"llm_config.architectures is {kinds!r}; only {' and '.join(_ARCHITECTURES)} are known"
        )
    if setting(stated, "model_type", kind) != kind:
        raise ValueError(f"llm_config.model_type is {stated['model_type']!r}, not {kind!r}")
    if kind == "internlm2":
        _check(stated, _INTERNLM2_ONLY, "llm_config.")
    text = decoders.read({**stated, "model_type": kind}, kind)
    tied = setting(stated, "tie_word_embeddings", False)
    return replace(text, tie_word_embeddings=tied), stated


# The decoders of `llm_config` that are known, by architecture. Phi-3-mini-128k stretches its
# positions by "longrope", which no decoder here does.
_ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "InternLM2ForCausalLM": "internlm2"}
_INTERNLM2_ONLY: dict[str, tuple[object, object]] = {
    "bias": (False, True),
    "rope_pos_id_version": ("default", "default"),  # or else a picture takes fewer positions
}


def _image(source: Source, vision: InternVit, tokens: int) -> ImageSpec:
    found = find_settings(source.files, GOT_OCR2, (GOT_OCR2,))
    if found is None:
        raise FileError(PREPROCESSOR, "is not there; it says how pictures are cut into tiles")
    check_rows(source.files, vision.image_size, tokens)
    rows = setting(source.files["config.json"], "image_seq_length", tokens)
    if rows != tokens:
        raise ValueError(f"image_seq_length is {rows}; a tile makes {tokens} image embeddings")
    # InternVLProcessor asks for tiles whatever the file says (4.57 and 5,
    # processing_internvl.py, InternVLProcessorKwargs).
    cutting = replace(found, values={**found.values, "crop_to_patches": True})
    return image_spec(cutting, vision.image_size, tokens, max_pictures=_MAX_PICTURES)


def _own_image(config: Config, vision: InternVit, tokens: int) -> ImageSpec:
    """As load_image in the models' cards and dynamic_preprocess do; the original's code does not
    read preprocessor_config.json.
    """
    counts = {}
    for key, default in (("min_dynamic_patch", 1), ("max_dynamic_patch", 6)):
        counts[key] = setting(config, key, default)
        if counts[key] < 1:
            raise ValueError(f"{key} is {counts[key]}; it must be at least 1")
    tiles = TileSpec(
        "ratio",
        split=setting(config, "dynamic_image_size", False),
        least=counts["min_dynamic_patch"],
        most=counts["max_dynamic_patch"],
        overview="last" if setting(config, "use_thumbnail", False) else "none",
        overview_of="picture",
    )
    return ImageSpec(
        vision.image_size, tokens, _MEAN, _STD, max_pictures=_MAX_PICTURES, tiles=tiles
    )


@dataclass(frozen=True)
class _Template:
    """A conversation in ChatML: a system turn ("" for none), and what ends a turn."""

    system: str
    end: str = f"{_TURN_END}\n"


_OLD_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# internvl/conversation.py, for folders that lack the copy of it that is published with a model.
_TEMPLATES = {
    "Hermes-2": _Template(_OLD_SYSTEM, _TURN_END),
    "internlm2-chat": _Template(_OLD_SYSTEM, _TURN_END),
    "internvl2_5": _Template(_SYSTEM),
}
_CONVERSATION = "conversation.py"
_CHAT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>")


def _template(source: Source) -> _Template:
    """transformers' chat template as far as it differs between checkpoints: the system's words that
    it writes of its own.
    """
    if source.template:
        raise ValueError("InternVL in transformers' layout has one prompt template")
    stated = chat_template(source.files, "tokenizer_config.json")
    if stated is None:
        return _Template("")
    name, text = stated
    if _TURN not in text:
        raise FileError(name, f"its chat_template lacks {_TURN}; only ChatML is known")
    found = _CHAT_SYSTEM.search(text)
    return _Template(found[1].replace("\\n", "\n") if found else "")


def _own_template(source: Source, config: Config) -> _Template:
    """The template that config.json names, as the checkpoint's own conversation.py has it."""
    name = source.template or setting(config, "template", "")
    published = section(source.files.get(_CONVERSATION, {}), name)
    if name not in _TEMPLATES:
        raise ValueError(f"template {name!r} is not one of {', '.join(_TEMPLATES)}")
    template = _TEMPLATES[name]
    for key, known in (
        ("system_template", f"{_TURN}system\n{{system_message}}"),
        ("roles", (f"{_TURN}user\n", f"{_TURN}assistant\n")),
        ("sep_style", "MPT"),
        ("sep", template.end),
    ):
        if published.get(key, known) != known:
            raise FileError(
                _CONVERSATION, f"{name}: {key} is {published[key]!r}; only {known!r} is known"
            )
    system = setting(published, "system_message", template.system)
    if config.get("system_message") is not None:
        system = setting(config, "system_message", system)
    return replace(template, system=system)


def _token_ids(source: Source) -> dict[str, int]:
    """The ids of the tokens that a prompt needs."""
    added, config = source.tokenizer.added, source.files["config.json"]
    lacking = next((text for text in _TOKENS if text not in added), None)
    if lacking:
        raise ValueError(f"the tokenizer lacks {lacking}")
    for key, known in _NAMED.items():
        stated = source.files.get("tokenizer_config.json", {}).get(key, known)
        if stated != known:
            raise FileError("tokenizer_config.json", f"{key} is {stated!r}; only {known} is known")
    ids = {text: added[text].id for text in _TOKENS}
    if setting(config, "image_token_id", ids[_CONTEXT]) != ids[_CONTEXT]:
        raise ValueError(
            f"image_token_id is {config['image_token_id']}, but {_CONTEXT} has the id "
            f"{ids[_CONTEXT]}"
        )
    return ids


def _prompt(source: Source, template: _Template, ids: dict[str, int], own: bool) -> PromptSpec:
    cutter = Cutter(source.tokenizer, "none", ids[_TURN_END])
    end = template.end
    turned = f"{_TURN}system\n{{}}{end}"
    # The original writes its system turn even where it says nothing.
    system = turned.format(template.system) if own or template.system else ""
    turn = f"{_TURN}user\n<image>{{prompt}}{end}{_TURN}assistant\n"
    begin = ("{bos}",) if source.tokenizer.add_bos else ()
    return PromptSpec(
        template=(*begin, *cutter.cut(f"{system}{turn}", goes_on=True)),
        system_template=(*begin, *cutter.cut(turned.format(SYSTEM) + turn, goes_on=True)),
        turn=cutter.cut(f"{end}{turn}", goes_on=True),
        tasks={"caption": "Please describe the image shortly."},
        joined=True,
        picture=PictureLayout(
            whole=(_START, "{image}", _END, "\n"),
            # As the models' cards write several pictures.
            several=("Image-{number}: ",) if own else (),
            tokens={text: ids[text] for text in (_START, _END)},
        ),
    )


_PARTS = (
    (re.compile(r"vision_model\.(.+)"), "vision."),
    (re.compile(r"mlp1\.0\.(.+)"), "projector.layer_norm."),
    (re.compile(r"mlp1\.1\.(.+)"), "projector.linear_1."),
    (re.compile(r"mlp1\.3\.(.+)"), "projector.linear_2."),
    # transformers before 4.52, and from there on.
    (re.compile(r"(?:model\.)?vision_tower\.(.+)"), "vision."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "projector."),
    (re.compile(r"(?:language_model\.model|model\.language_model)\.(.+)"), "decoder."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"language_model\.output\.(weight)"), "decoder.lm_head."),
)
_UNUSED = re.compile(r".+\.rotary_emb\.inv_freq")


FAMILY = Family(
    name="internvl",
    license="mit",
    model_types=("internvl", _OWN),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
)
