"""LLaVA-OneVision: SigLIP on tiles, linear maps, a Qwen2 decoder, in both layouts.

Facts from transformers 4.57 (models/llava_onevision) and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import decoders, llava_shape, pinpoints
from edgevlm.family import (
    TOWER,
    Config,
    Family,
    FileError,
    Model,
    Source,
    decoder_spec,
    read_config,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image_specs import image_spec
from edgevlm.parts.llama import Llama
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.parts.siglip import SIGLIP_TOWER, SiglipTower
from edgevlm.processors import LLAVA_ONEVISION, PROCESSOR, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, MapSpec, PictureLayout, PromptSpec
from edgevlm.templates import IMAGE, TEMPLATES, Cutter, chat_template

# LlavaOnevisionConfig's defaults where it has no vision_config are those of So400m, and but for the
# layers those of LLaVA-NeXT's SigLipVisionConfig.
_SIGLIP = replace(SIGLIP_TOWER, final_norm=False)
_SO400M = replace(
    _SIGLIP,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
_OWN_SO400M = replace(_SO400M, num_hidden_layers=27)
# A tower inside a checkpoint of LLaVA-NeXT's own layout does not say its heads: they are as wide as
# So400m's, or else as smaller SigLIPs', unless the user knows their number.
_HEADS, _HEAD_WIDTHS = "vision_heads", (72, 64)
_RATIO = "vision_aspect_ratio"
_ANYRES = re.compile(r"anyres_max_([1-9]\d*)")
_HALF = (0.5, 0.5, 0.5)
# transformers and LLaVA-NeXT set no bound; the context does.
_MAX_PICTURES = 64
# What a config of transformers' class may say of no other value, and one of LLaVA-NeXT's. Of that,
# mm_newline_position and mm_spatial_pool_* are about films.
_ONLY: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "full",
    "use_image_newline_parameter": True,
}
_OWN_ONLY: Mapping[str, Any] = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}


def _describe(source: Source) -> Model:
    if source.fit:
        raise ValueError("LLaVA-OneVision has one fit of pictures")
    config = source.files["config.json"]
    own = llava_shape.is_own_qwen(config)
    for key, known in (_OWN_ONLY if own else _ONLY).items():
        if (value := setting(config, key, known)) != known:
            raise ValueError(f"{key} is {value!r}; only {known!r} is known")
    text = _own_text(config) if own else _text(source, config)
    vision = _own_vision(source, config) if own else _vision(source, config)
    image, notes = (_own_image(config, vision), ()) if own else _image(source, config, vision)
    stated = config if own else section(config, "text_config")
    stops = stop_tokens(source.files, stated, decoders.EOS["qwen2"])
    cutter = Cutter(source.tokenizer, "none", stops[0])
    name, more = _template(source, own)
    if name not in _TEMPLATES:
        raise ValueError(f"the template {name!r} is not one of {', '.join(_TEMPLATES)}")
    template = TEMPLATES[name]
    return Model(
        image=image,
        prompt=_prompt(name, cutter),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(
            stop_tokens=tuple(dict.fromkeys((cutter.end(template), *stops))), max_tokens=512
        ),
        vision=vision,
        projector=llava_shape.anyres(llava_shape.read_projector(config, vision, text, own)),
        text=text,
        markers=_own_markers(source) if own else _markers(config),
        original=template.before + IMAGE + "\n{prompt}" + template.after,
        notes=(*notes, *more),
    )


def _text(source: Source, config: Config) -> Llama:
    stated = section(config, "text_config")
    text = decoders.read(stated, "qwen2")
    if not isinstance(text, Qwen2):
        raise ValueError(f"the decoder is a {text.architecture!r}; only qwen2 is known")
    return decoders.with_tables(text, source, stated)


def _own_text(config: Config) -> Qwen2:
    # LlavaQwenForCausalLM takes the scaling of positions out of its config.
    text = decoders.read({**config, "model_type": "qwen2", "rope_scaling": None}, "qwen2")
    assert isinstance(text, Qwen2)
    return text


def _vision(source: Source, config: Config) -> SiglipTower:
    llava_shape.keep_tower(source)
    if _HEADS in source.settings:
        raise ValueError(f"{_HEADS} cannot be set where vision_config states the heads")
    stated = section(config, "vision_config")
    vision = _siglip(_SIGLIP, stated) if stated else _SO400M
    depth, layer = vision.num_hidden_layers, setting(config, "vision_feature_layer", -1)
    read = layer if layer >= 0 else depth + 1 + layer
    if not 0 < read <= depth:
        raise ValueError(f"vision_feature_layer {layer} is not one of a tower of {depth}")
    return replace(vision, num_hidden_layers=read, depth=depth)


def _siglip(defaults: SiglipTower, stated: Config) -> SiglipTower:
    kind = stated.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise ValueError(f"the vision tower is a {kind!r}; only siglip_vision_model is known")
    vision = read_config(defaults, stated, "vision_config.")
    if vision.num_channels != 3:
        raise ValueError(f"vision_config.num_channels is {vision.num_channels}; only 3 is known")
    return vision


def _own_vision(source: Source, config: Config) -> SiglipTower:
    """The tower without its last layer, which SigLipVisionTower takes off (llava/model/
    multimodal_encoder/siglip_encoder.py); inside a checkpoint are the layers that it kept.
    """
    # That class does not look at it.
    if (layer := setting(config, "mm_vision_select_layer", -2)) not in (-2, -1):
        raise ValueError(f"mm_vision_select_layer is {layer}; only -2 is known")
    if not _reads_named(config):
        llava_shape.keep_tower(source)
    given = source.files.get(f"{TOWER}config.json")
    vision = _apart(given) if given else _inside(source, config)
    stated = source.settings.get(_HEADS, str(vision.num_attention_heads))
    heads = int(stated) if re.fullmatch("[0-9]{1,4}", stated) else 0
    if not heads or vision.hidden_size % heads:
        raise ValueError(
            f"the vision tower of width {vision.hidden_size} cannot have {stated} heads; state "
            f"their number (--set {_HEADS}=16)"
        )
    return replace(vision, num_attention_heads=heads)


def _reads_named(config: Config) -> bool:
    """True where the original reads the named tower after the weights, whatever is in them."""
    trained = str(config.get("mm_tunable_parts") or "").split(",")
    tuned = config.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in trained
    return bool(config.get("delay_load")) and not tuned


def _apart(given: Config) -> SiglipTower:
    """The tower of a folder of its own."""
    vision = _siglip(_OWN_SO400M, section(given, "vision_config") or given)
    depth = vision.num_hidden_layers
    if depth < 2:
        raise ValueError("the vision tower has one layer, and the last one is not read")
    return replace(vision, num_hidden_layers=depth - 1, depth=depth)


def _inside(source: Source, config: Config) -> SiglipTower:
    """The tower inside the weights, by their shapes."""
    vision, positions = llava_shape.inside(source, _SO400M)
    grid, patch, width = math.isqrt(positions), vision.patch_size, vision.hidden_size
    if grid**2 != positions or vision.num_channels != 3:
        raise ValueError("the vision tower inside is not a SigLIP; only that is known")
    # Patches that are not whole are left out, so the sides of a tile may be a little longer.
    listed = config.get("image_grid_pinpoints")
    pairs = listed if isinstance(listed, list) else []
    sides = [n for pair in pairs if isinstance(pair, list) for n in pair if type(n) is int]
    side = next(
        n for n in (math.gcd(*sides), _SO400M.image_size, grid * patch) if n // patch == grid
    )
    heads = next((width // n for n in _HEAD_WIDTHS if width % n == 0), vision.num_attention_heads)
    # Of So400m's 27 layers, if all are there, the last one is not read either.
    depth = vision.num_hidden_layers
    return replace(
        vision,
        num_hidden_layers=min(depth, _SO400M.num_hidden_layers),
        depth=depth,
        image_size=side,
        num_attention_heads=heads,
    )


def _own_image(config: Config, vision: SiglipTower) -> ImageSpec:
    """As LLaVA-NeXT's SigLipImageProcessor, which reads no file; several pictures as its training
    and its tutorial, with image_aspect_ratio "pad" (docs/LLaVA_OneVision_Tutorials.ipynb).
    """
    tiles = replace(pinpoints.own_tiles(config, vision.image_size), alone=True)
    return ImageSpec(
        vision.image_size, vision.rows, _HALF, _HALF, max_pictures=_MAX_PICTURES, tiles=tiles
    )


def _image(
    source: Source, config: Config, vision: SiglipTower
) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec, and a note where no file of the checkpoint states it."""
    side, tokens = vision.image_size, vision.rows
    ratio = setting(config, _RATIO, "anyres_max_9")
    if not (found_ratio := _ANYRES.fullmatch(ratio)):
        raise ValueError(f"{_RATIO} is {ratio!r}; only anyres_max_<N> is known")
    processor = source.files.get(PROCESSOR, {})
    for key, known in (
        ("num_image_tokens", tokens),
        (_RATIO, ratio),
        ("vision_feature_select_strategy", "full"),
        ("image_token", IMAGE),
    ):
        if processor.get(key, known) not in (known, None):
            raise FileError(PROCESSOR, f"{key} is {processor[key]!r}, config.json has {known!r}")
    notes: tuple[str, ...] = ()
    found = find_settings(source.files, LLAVA_ONEVISION, (LLAVA_ONEVISION,))
    if found is None:
        found, notes = default_settings(LLAVA_ONEVISION, side)
    joined = MapSpec(int(found_ratio[1]), pinpoints.DIGITS)
    tiles = replace(pinpoints.tiles(pinpoints.stated(found, config, side), joined), alone=True)
    image = image_spec(found, side, tokens, max_pictures=_MAX_PICTURES)
    return replace(image, tiles=tiles), notes


# Templates, and the break before a question's words: where it is none, each picture has its own, as
# llava/serve/gradio_multi_image.py has several.
_TEMPLATES = {"onevision": "\n", "chatml": "", "qwen_1_5": ""}
# All texts that transformers' chat templates write beside roles and contents.
_CHATS = {
    "onevision": {" ", "<image>", "\n", "<|im_end|>"},
    "chatml": {"\n", "<image>\n", "<|im_end|>\n"},
}
_TURN = "<|im_start|>"
_OPENINGS = {_TURN, f"{_TURN}assistant\n"}
_FILM = "<video>"


def _template(source: Source, own: bool) -> tuple[str, tuple[str, ...]]:
    """The user's choice, or the template that the checkpoint's chat template is; the published one
    where it has none or one without Qwen2's turns, and a note of that.
    """
    stated = None if own else chat_template(source.files)
    if source.template or stated is None:
        return source.template or ("qwen_1_5" if own else "onevision"), ()
    file, text = stated
    if _TURN not in text:
        return "onevision", (f"{file}: its chat_template has no {_TURN} and is not followed",)
    written = " ".join(re.findall(r"\{\{(.*?)\}\}", text.replace("\\n", "\n"), re.DOTALL))
    written = re.sub(r"\[['\"]\w+['\"]\]", "", written).replace('"', "'")
    texts = set(re.findall("'([^']*)'", re.sub(r"'\s*\+\s*'", "", written)))
    for name, known in _CHATS.items():
        if {each for each in texts if _FILM not in each} == known | _OPENINGS:
            return name, ()
    raise FileError(
        file, f"its chat_template is not known; choose one of {', '.join(_TEMPLATES)} (--template)"
    )


def _prompt(name: str, cutter: Cutter) -> PromptSpec:
    """The prompt of a conversation, all of whose texts the originals tokenize anew each time."""
    template, apart = TEMPLATES[name], _TEMPLATES[name]
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    words = apart + "{prompt}" + template.after

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text, goes_on=True)

    return PromptSpec(
        tasks=llava_shape.TASKS,
        template=(*begin, *cut(template.before + IMAGE + words)),
        text_template=(*begin, *cut(template.before + words)),
        turn=cut(template.again + IMAGE + words),
        text_turn=cut(template.again + words),
        joined=True,
        picture=PictureLayout(whole=("{image}",) if apart else ("{image}", "\n")),
        answered=cut(template.answered)[-1] if template.answered else "",
        system_template=(*begin, *cut(template.system + IMAGE + words)),
        system_text_template=(*begin, *cut(template.system + words)),
    )


def _markers(config: Config) -> dict[int, str]:
    """Tokens of pictures and films, which no text may become."""
    image = setting(config, "image_token_index", setting(config, "image_token_id", 151646))
    film = setting(config, "video_token_index", setting(config, "video_token_id", 151647))
    return {image: IMAGE, film: _FILM}


def _own_markers(source: Source) -> dict[int, str]:
    """The same in LLaVA-NeXT's layout, whose tokenizers may have the first."""
    token = source.tokenizer.added.get(IMAGE)
    return {token.id: IMAGE} if token else {}


FAMILY = Family(
    name="llava_onevision",
    license="apache-2.0",
    model_types=("llava_onevision", llava_shape.OWN_QWEN, "llava"),
    describe=_describe,
    locate=llava_shape.locate,
    tower=llava_shape.tower,
    settings={_HEADS: "attention heads of a vision tower inside LLaVA's own layout"},
    claims=llava_shape.is_own_qwen,
)
