"""LLaVA's shape: a CLIP tower, a small connector, a LLaMA-like decoder that reads causally.

MobilePALO and PALO, MobileVLM and MobileVLM V2, LLaVA-1.5 in its own layout and in transformers',
and what differs from them only in its decoder: LLaMA-3, Mistral, Phi-3. Facts from
haotian-liu/LLaVA, mbzuai-oryx/PALO and LLaVA-pp, Meituan-AutoML/MobileVLM and transformers 4.57
(models/llava).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import decoders
from edgevlm.family import (
    TOWER,
    Config,
    Family,
    Model,
    Source,
    Tokenizer,
    decoder_spec,
    locate_by_patterns,
    read_config,
    section,
    setting,
    stop_tokens,
)
from edgevlm.parts import Connector
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.linear import Linear
from edgevlm.parts.llama import Llama
from edgevlm.parts.mlp import Mlp
from edgevlm.processors import (
    CLIP,
    LLAVA,
    SIGLIP,
    ProcessorSettings,
    check_rows,
    default_settings,
    find_settings,
    image_spec,
)
from edgevlm.specs import AnswerSpec, ImageSpec, PromptSpec
from edgevlm.templates import BEGIN_3, IMAGE, TEMPLATES, Cutter, Spaces, Template

# transformers' defaults for CLIPVisionConfig, which a config.json omits.
_VISION = ClipTower(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_OWN_LAYOUT = ("palo", "mobilevlm", "llava_llama", "llava_mistral", "llava_phi", "llava_phi3")
# OpenAI's towers have heads of this width; a tower inside a checkpoint does not say.
_CLIP_HEAD = 64
_TOKENIZER = "tokenizer_config.json"
_FRAME, _PATCH = ("<im_start>", "<im_end>"), "<im_patch>"


def _describe(source: Source) -> Model:
    config, own = source.files["config.json"], _is_own(source.files["config.json"])
    decoder = config if own else section(config, "text_config")
    text = decoders.read(decoder, config["model_type"])
    vision = _vision(source, config)
    projector = _projector(config, vision, text, own)
    template = _template(source, own)
    stops = stop_tokens(source.files, decoder, decoders.EOS[text.architecture])
    cutter = Cutter(source.tokenizer, _spaces(source, own), stops[0])
    ends = dict.fromkeys((cutter.end(template), *stops))
    image, notes = _image(source, vision, projector.tokens(vision.rows), own)
    return Model(
        image=image,
        prompt=_prompt(config, template, cutter, own),
        decoder=decoder_spec(text, "causal"),
        # The originals answer until their chat ends a turn, at most 1024 tokens (llava/serve).
        answer=AnswerSpec(stop_tokens=tuple(ends), max_tokens=512),
        vision=vision,
        projector=projector,
        text=text,
        markers=_markers(config, source.tokenizer, own),
        prefix="" if source.tokenizer.bytes else " ",
        prefix_once=cutter.spaces == "first",
        original=IMAGE.join(_around(config, template)),
        notes=notes,
    )


def _is_own(config: Config) -> bool:
    """True for a config of the original projects, which called theirs "llava" at first."""
    kind = config["model_type"]
    first = kind == "llava" and "text_config" not in config and "mm_vision_tower" in config
    return first or kind in _OWN_LAYOUT


def _vision(source: Source, config: Config) -> ClipTower:
    """The tower as far as its features are read: from its own config, or else from its tensors."""
    given = source.files.get(f"{TOWER}config.json")
    found = section(given or config, "vision_config") or given or {}
    kind = found.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise ValueError(f"the vision tower is a {kind!r}; only clip_vision_model is known")
    vision = read_config(_VISION, found) if found else _from_shapes(source)
    layer = config.get("mm_vision_select_layer", config.get("vision_feature_layer", -2))
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer!r}; only one layer can be read")
    depth = vision.num_hidden_layers
    read = layer if layer >= 0 else depth + 1 + layer
    if not 0 < read <= depth:
        raise ValueError(f"vision layer {layer} is not one of a tower of {depth}")
    select = setting(config, "vision_feature_select_strategy", "patch")
    select = setting(config, "mm_vision_select_feature", select)
    if select not in _SELECT:
        raise ValueError(f"the feature selection {select!r} is not one of {', '.join(_SELECT)}")
    return replace(vision, num_hidden_layers=read, depth=depth, class_token=_SELECT[select])


# Whether the class token's row is read with the patches'.
_SELECT = {"patch": False, "default": False, "cls_patch": True, "full": True}


def _from_shapes(source: Source) -> ClipTower:
    shapes = {
        name.removeprefix("vision."): shape
        for raw, shape in source.shapes.items()
        if (name := _locate(raw) or "").startswith("vision.")
    }
    try:
        width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        mlp, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError("it holds no vision tower; name one (--vision-tower)") from None
    layers = [int(m[1]) for n in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", n))]
    return replace(
        _VISION,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=width // _CLIP_HEAD,
        num_channels=channels,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
    )


def _projector(config: Config, vision: ClipTower, text: Llama, own: bool) -> Connector:
    for key in ("s2", "mm_resampler_type"):
        if config.get(key):
            raise ValueError(f"{key} is {config[key]!r}; only models without it are known")
    inside, outside = vision.hidden_size, text.hidden_size
    if not own:
        act, bias = config.get("projector_hidden_act", "gelu"), "multimodal_projector_bias"
        if act != "gelu" or not config.get(bias, True):
            raise ValueError(f"projector_hidden_act {act!r} or {bias} is not known; LLaVA has gelu")
        return Mlp(in_features=inside, out_features=outside, depth=2)
    name = str(config.get("mm_projector_type", "linear"))
    if depth := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return Mlp(in_features=inside, out_features=outside, depth=int(depth[1]))
    if name not in _CONNECTORS:
        raise ValueError(
            f"mm_projector_type {name!r} is not one of {', '.join(_CONNECTORS)}, mlp<N>x_gelu"
        )
    return _CONNECTORS[name](in_features=inside, out_features=outside)


_CONNECTORS: dict[str, type[Linear | Ldp | LdpV2]] = {
    "linear": Linear,
    "ldpnet": Ldp,
    "ldpnetv2": LdpV2,
}


def _image(
    source: Source, vision: ClipTower, tokens: int, own: bool
) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec, and a note where no file of the checkpoint states it."""
    side, ratio = vision.image_size, source.files["config.json"].get("image_aspect_ratio")
    if ratio not in (None, "square", "pad"):
        raise ValueError(f"image_aspect_ratio {ratio!r} is not known; LLaVA-1.5 has pad or square")
    notes: tuple[str, ...] = ()
    found = _settings(source, own)
    if found is None:
        named = f", those of {_named(source)} were not read" if own and _named(source) else ""
        found, notes = default_settings(CLIP, side, named)
    if not own:
        check_rows(source.files, side, tokens)
    if source.fit == "crop" and found.kind == LLAVA:
        found = replace(found, values={**found.values, "do_pad": False})
    pad = source.fit == "pad" or (source.fit is None and own and ratio == "pad")
    image = image_spec(found, side, tokens, pad=pad)
    if source.fit not in (None, image.fit):
        raise ValueError(f"the fit {source.fit!r} is not that of its processor, {image.fit!r}")
    return image, notes


def _settings(source: Source, own: bool) -> ProcessorSettings | None:
    """The processor that the original's code loads.

    LLaVA's own loads CLIPImageProcessor from the tower's folder.
    """
    if not own:
        return find_settings(source.files, LLAVA, (CLIP, LLAVA, SIGLIP))
    tower = find_settings(source.files, CLIP, (CLIP,), TOWER)
    return tower or find_settings(source.files, CLIP, (CLIP,))


def _template(source: Source, own: bool) -> Template:
    """The user's choice, or what models of this decoder and layout were trained with."""
    default = "vicuna_v1" if own else "hf"
    if "<|start_header_id|>" in source.tokenizer.added:
        default = "llava_llama3" if own else "llama3"
    elif "<|assistant|>" in source.tokenizer.added:
        default = "phi3_instruct" if own else "phi3"
    name = source.template or default
    if name not in TEMPLATES:
        raise ValueError(f"the template {name!r} is not one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _spaces(source: Source, own: bool) -> Spaces:
    """LLaVA's own code uses the slow tokenizers where there are any, transformers the fast ones."""
    if source.tokenizer.bytes:
        return "none"
    slow, said = own and source.tokenizer.slow, source.tokenizer.prepends
    if said and not slow:
        return said
    if source.files.get(_TOKENIZER, {}).get("legacy") is not False:
        return "every"
    return "start" if slow else "first"


def _around(config: Config, template: Template) -> tuple[str, str]:
    """Texts of the prompt before the picture and after it."""
    opened, closed = _FRAME if config.get("mm_use_im_start_end") else ("", "")
    return template.before + opened, f"{closed}\n{{prompt}}{template.after}"


def _prompt(config: Config, template: Template, cutter: Cutter, own: bool) -> PromptSpec:
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    head, tail = _around(config, template)
    if not begin and head.startswith(BEGIN_3):
        # tokenizer_image_token takes the template's begin token for the tokenizer's own, and drops
        # the first token of what follows the picture, as if that were another.
        tail = tail.removeprefix("\n")
    # LLaVA's own code tokenizes what stands on each side of the picture by itself.
    joined = cutter.cut(head + IMAGE + tail)
    asked = (*cutter.cut(head), "{image}", *cutter.cut(tail)) if own else joined
    answered = "{prompt}" + template.after
    return PromptSpec(
        tasks={"caption": "Describe the image.", "ocr": "What is the text in the image?"},
        template=(*begin, *asked),
        text_template=(*begin, *cutter.cut(template.before + answered)),
        turn=cutter.cut(template.again + answered, goes_on=True),
    )


def _markers(config: Config, tokenizer: Tokenizer, own: bool) -> dict[int, str]:
    """Tokens of the picture, which no text may become."""
    if not own:
        return {_image_token(config): IMAGE}
    # LLaVA's code adds both as special tokens, whatever the files say.
    patch = _PATCH if config.get("mm_use_im_patch_token", True) else ""
    frame = _FRAME if config.get("mm_use_im_start_end") else ()
    lacking = [text for text in frame if text not in tokenizer.added]
    if lacking:
        raise ValueError(f"mm_use_im_start_end is set, but the tokenizer lacks {lacking[0]}")
    known = [text for text in (*frame, patch) if text in tokenizer.added]
    return {tokenizer.added[text].id: text for text in known}


def _image_token(config: Config) -> int:
    return setting(config, "image_token_index", setting(config, "image_token_id", 32000))


# LLaVA's own layout, transformers' up to 4.51, from 4.52 and from 5.0, a tower of its own.
_PARTS = (
    (re.compile(r"model\.vision_tower\.vision_tower\.vision_model\.(.+)"), "vision."),
    (
        re.compile(
            r"(?:model\.)?vision_tower\.(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder)\..+)"
        ),
        "vision.",
    ),
    (re.compile(re.escape(TOWER) + r"vision_model\.(.+)"), "vision."),
    (re.compile(r"model\.mm_projector\.(?:model\.)?(.+\..+)"), "projector."),
    (re.compile(r"model\.mm_projector\.(weight|bias)"), "projector.linear."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)"), "projector.0."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)"), "projector.2."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)"), "decoder."),
    (re.compile(r"model\.((?:layers|embed_tokens|norm)\..+)"), "decoder."),
)
# CLIP's text tower and heads, the last norm (for the class token alone), stored tables.
_UNUSED = re.compile(
    r".*vision_(?:model|tower)\.(?:post_layernorm\..+|embeddings\.position_ids)"
    rf"|{re.escape(TOWER)}(?:text_model\..+|logit_scale|(?:visual|text)_projection\.weight)"
    r"|.+\.rotary_emb\.inv_freq"
)


def _locate(name: str) -> str | None:
    return locate_by_patterns(name, _PARTS, _UNUSED)


def _tower(source: Source) -> str | None:
    """The name in `mm_vision_tower`, unless the checkpoint holds a tower's tensors itself."""
    inside = any((_locate(name) or "").startswith("vision.") for name in source.shapes)
    return None if inside else _named(source)


def _named(source: Source) -> str | None:
    config: Mapping[str, Any] = source.files["config.json"]
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    return str(name) if name else None


FAMILY = Family(
    name="llava",
    license="other",
    model_types=(*_OWN_LAYOUT, "llava"),
    describe=_describe,
    locate=_locate,
    tower=_tower,
    processor=_named,
)
