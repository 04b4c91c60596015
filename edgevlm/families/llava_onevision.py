"""LLaVA-OneVision: SigLIP on tiles, two linear maps, a Qwen2 decoder; transformers' layout.

Facts from transformers 4.57 (models/llava_onevision) and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import re
from dataclasses import replace

from edgevlm import decoders, llava_shape, pinpoints
from edgevlm.family import (
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
from edgevlm.parts.anyres import Anyres
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.parts.siglip import SiglipTower
from edgevlm.processors import LLAVA_ONEVISION, PROCESSOR, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, MapSpec, PictureLayout, PromptSpec, TileSpec
from edgevlm.templates import IMAGE, TEMPLATES, Cutter

# Defaults of SiglipVisionConfig, which a config.json omits; LlavaOnevisionConfig's where it has no
# vision_config.
_SIGLIP = SiglipTower(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    final_norm=False,
)
_SO400M = replace(
    _SIGLIP,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
_RATIO = "vision_aspect_ratio"
_ANYRES = re.compile(r"anyres_max_([1-9]\d*)")
# transformers rounds the lengths that it cuts off (modeling_llava_onevision, unpad_image).
_DIGITS = 7
# transformers sets no bound; the context does.
_MAX_PICTURES = 64
# What a config of this class may say of no other value.
_ONLY = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "full",
    "use_image_newline_parameter": True,
}


def _describe(source: Source) -> Model:
    if source.fit:
        raise ValueError("LLaVA-OneVision has one fit of pictures")
    config = source.files["config.json"]
    for key, known in _ONLY.items():
        if (value := setting(config, key, known)) != known:
            raise ValueError(f"{key} is {value!r}; only {known!r} is known")
    text, vision = _text(config), _vision(config)
    image, notes = _image(source, config, vision)
    stops = stop_tokens(source.files, section(config, "text_config"), decoders.EOS["qwen2"])
    cutter = Cutter(source.tokenizer, "none", stops[0])
    template = source.template or "onevision"
    if template not in _TEMPLATES:
        raise ValueError(f"the template {template!r} is not one of {', '.join(_TEMPLATES)}")
    ends = dict.fromkeys((cutter.end(TEMPLATES[template]), *stops))
    return Model(
        image=image,
        prompt=_prompt(template, cutter),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(stop_tokens=tuple(ends), max_tokens=512),
        vision=vision,
        projector=Anyres(in_features=vision.hidden_size, out_features=text.hidden_size, depth=2),
        text=text,
        markers=_markers(config),
        original=TEMPLATES[template].before + IMAGE + "\n{prompt}" + TEMPLATES[template].after,
        notes=notes,
    )


def _text(config: Config) -> Qwen2:
    stated = section(config, "text_config")
    text = decoders.read(stated, "qwen2")
    if not isinstance(text, Qwen2):
        raise ValueError(f"the decoder is a {text.architecture!r}; only qwen2 is known")
    tied = setting(stated, "tie_word_embeddings", False)
    return replace(text, tie_word_embeddings=tied or setting(config, "tie_word_embeddings", False))


def _vision(config: Config) -> SiglipTower:
    stated = section(config, "vision_config")
    kind = stated.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise ValueError(f"the vision tower is a {kind!r}; only siglip_vision_model is known")
    vision = read_config(_SIGLIP, stated, "vision_config.") if stated else _SO400M
    if vision.num_channels != 3:
        raise ValueError(f"vision_config.num_channels is {vision.num_channels}; only 3 is known")
    depth, layer = vision.num_hidden_layers, setting(config, "vision_feature_layer", -1)
    read = layer if layer >= 0 else depth + 1 + layer
    if not 0 < read <= depth:
        raise ValueError(f"vision_feature_layer {layer} is not one of a tower of {depth}")
    return replace(vision, num_hidden_layers=read, depth=depth)


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
    tiles = TileSpec(
        "pinpoints",
        overview="first",
        canvases=pinpoints.stated(found, config, side),
        overview_of="picture",
        alone=True,
        map=MapSpec(int(found_ratio[1]), _DIGITS),
    )
    image = image_spec(found, side, tokens, max_pictures=_MAX_PICTURES)
    return replace(image, tiles=tiles), notes


# The texts between a template's begin and the words of a question without a picture.
_TEMPLATES = {"onevision": "\n", "qwen_1_5": ""}


def _prompt(name: str, cutter: Cutter) -> PromptSpec:
    """The prompt with all pictures of a question on one line, as the published chat template."""
    template = TEMPLATES[name]
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    asked, plain = IMAGE + "\n{prompt}", _TEMPLATES[name] + "{prompt}"

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text + template.after, goes_on=True)

    return PromptSpec(
        tasks=llava_shape.TASKS,
        template=(*begin, *cut(template.before + asked)),
        text_template=(*begin, *cut(template.before + plain)),
        turn=cut(template.again + asked),
        text_turn=cut(template.again + plain),
        picture=PictureLayout(whole=("{image}",)),
    )


def _markers(config: Config) -> dict[int, str]:
    """Tokens of pictures and films, which no text may become."""
    image = setting(config, "image_token_index", setting(config, "image_token_id", 151646))
    film = setting(config, "video_token_index", setting(config, "video_token_id", 151647))
    return {image: IMAGE, film: "<video>"}


FAMILY = Family(
    name="llava_onevision",
    license="apache-2.0",
    model_types=("llava_onevision",),
    describe=_describe,
    locate=llava_shape.locate,
)
