"""Checkpoints of LLaVA's shape, in its own layout and in transformers', for several families.

Facts from haotian-liu/LLaVA, mbzuai-oryx/PALO and LLaVA-pp, Meituan-AutoML/MobileVLM and
transformers 4.57 (models/llava, models/llava_next).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

from edgevlm import decoders
from edgevlm.family import (
    TOWER,
    Config,
    Model,
    Source,
    Tokenizer,
    decoder_spec,
    locating,
    read_config,
    section,
    setting,
    stop_tokens,
)
from edgevlm.parts import Connector, VisionTower
from edgevlm.parts.anyres import Anyres
from edgevlm.parts.clip import CLIP_TOWER, ClipTower
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.linear import Linear
from edgevlm.parts.llama import Llama
from edgevlm.parts.mlp import Mlp
from edgevlm.processors import CLIP, ProcessorSettings, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec
from edgevlm.templates import BEGIN_3, IMAGE, TEMPLATES, Cutter, Spaces, Template

Tower = TypeVar("Tower", bound=VisionTower)

OWN_LAYOUT = ("palo", "mobilevlm", "llava_llama", "llava_mistral", "llava_phi", "llava_phi3")
# LLaVA-NeXT's code with a Qwen2: its type, or LLaVA's first one with its class.
OWN_QWEN, _QWEN_CLASS = "llava_qwen", "LlavaQwenForCausalLM"
# OpenAI's towers have heads of this width; a tower inside a checkpoint does not say.
_CLIP_HEAD = 64
_TOKENIZER = "tokenizer_config.json"
TASKS = {"caption": "Describe the image.", "ocr": "What is the text in the image?"}
_FRAME, _PATCH = ("<im_start>", "<im_end>"), "<im_patch>"


# Source, its tower, image embeddings of a square, whether the layout is the original projects' ->
# the picture's spec and notes of what no file of the checkpoint states.
Pictures = Callable[[Source, ClipTower, int, bool], tuple[ImageSpec, tuple[str, ...]]]


# Decoders of other families, whose templates are not LLaVA's.
_OTHERS = ("qwen2", "internlm2")


def describe(source: Source, default: str, pictures: Pictures, *, several: bool = False) -> Model:
    """Describes a checkpoint; `default` is its template where the user chose none.

    With `several` a request may have several pictures, each on a line of its own.
    """
    config, own = source.files["config.json"], is_own(source.files["config.json"])
    decoder = config if own else section(config, "text_config")
    # transformers takes a decoder that does not say for LLaMA (LlavaConfig, LlavaNextConfig).
    kind = setting(decoder, "model_type", config["model_type"] if own else "llama")
    if kind in _OTHERS:
        raise ValueError(f"text_config.model_type {kind!r} is not known; no LLaVA here has it")
    text = decoders.read(decoder, kind)
    if not own:
        text = decoders.with_tables(text, source, decoder)
    vision = _vision(source, config)
    projector = read_projector(config, vision, text, own)
    template = _template(source, default)
    stops = stop_tokens(source.files, decoder, decoders.EOS[text.architecture])
    cutter = Cutter(source.tokenizer, _spaces(source, own), stops[0])
    ends = dict.fromkeys((cutter.end(template), *stops))
    image, notes = pictures(source, vision, projector.tokens(vision.rows), own)
    prompt = _several(template, cutter) if several else _prompt(config, template, cutter, own)
    return Model(
        image=image,
        prompt=prompt,
        decoder=decoder_spec(text, "causal"),
        # The originals answer until their chat ends a turn, at most 1024 tokens (llava/serve).
        answer=AnswerSpec(stop_tokens=tuple(ends), max_tokens=512),
        vision=vision,
        projector=projector,
        text=text,
        markers=_markers(config, source.tokenizer, own),
        prefix="" if source.tokenizer.bytes else " ",
        prefix_once=cutter.spaces == "first",
        original=IMAGE.join(_around(config, template, template.before)),
        notes=notes,
    )


def is_own(config: Config) -> bool:
    """True for a config of the original projects, which called theirs "llava" at first."""
    kind = config["model_type"]
    first = kind == "llava" and "text_config" not in config and "mm_vision_tower" in config
    return first or kind in (*OWN_LAYOUT, OWN_QWEN)


def is_own_qwen(config: Config) -> bool:
    """True for a config of LLaVA-NeXT's own code whose decoder is a Qwen2."""
    classes = config.get("architectures")
    named = isinstance(classes, list) and _QWEN_CLASS in classes
    return config["model_type"] == OWN_QWEN or (is_own(config) and named)


def _vision(source: Source, config: Config) -> ClipTower:
    """The tower as far as its features are read: from its own config, or else from its tensors."""
    given = source.files.get(f"{TOWER}config.json")
    found = section(given or config, "vision_config") or given or {}
    kind = found.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise ValueError(f"the vision tower is a {kind!r}; only clip_vision_model is known")
    vision = read_config(CLIP_TOWER, found) if found else _from_shapes(source)
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
    vision, positions = inside(source, CLIP_TOWER)
    return replace(
        vision,
        num_attention_heads=vision.hidden_size // _CLIP_HEAD,
        image_size=round((positions - 1) ** 0.5) * vision.patch_size,
    )


def inside(source: Source, defaults: Tower) -> tuple[Tower, int]:
    """`defaults` with the sizes of the vision tower in the weights, and its number of positions.

    Pixels and heads are not to be seen. Raises ValueError where there is no tower.
    """
    shapes = {
        name.removeprefix("vision."): shape
        for raw, shape in source.shapes.items()
        if (name := locate(raw) or "").startswith("vision.")
    }
    try:
        width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        mlp, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError("it holds no vision tower; name one (--vision-tower)") from None
    layers = [int(m[1]) for n in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", n))]
    found = replace(
        defaults,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=max(layers) + 1,
        num_channels=channels,
        patch_size=patch,
    )
    return found, positions


def read_projector(config: Config, vision: VisionTower, text: Llama, own: bool) -> Connector:
    """The connector; raises ValueError for one that is not known."""
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


def anyres(projector: Connector) -> Anyres:
    """Linear maps with a newline; raises ValueError for another connector."""
    if not isinstance(projector, Mlp):
        raise ValueError(f"the projector is {projector.kind!r}; with tiles only linear maps are")
    return Anyres(**asdict(projector))


_CONNECTORS: dict[str, type[Linear | Ldp | LdpV2]] = {
    "linear": Linear,
    "ldpnet": Ldp,
    "ldpnetv2": LdpV2,
}


def own_settings(source: Source, side: int) -> tuple[ProcessorSettings, tuple[str, ...]]:
    """The processor that LLaVA's own code loads, CLIPImageProcessor from the tower's folder, and a
    note where no file states it.
    """
    tower = find_settings(source.files, CLIP, (CLIP,), TOWER)
    if found := tower or find_settings(source.files, CLIP, (CLIP,)):
        return found, ()
    named = named_tower(source)
    return default_settings(CLIP, side, f", those of {named} were not read" if named else "")


def _template(source: Source, default: str) -> Template:
    """The user's choice, or what models of this decoder and layout were trained with."""
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


def _around(config: Config, template: Template, before: str) -> tuple[str, str]:
    """Texts of the prompt before the picture and after it."""
    opened, closed = _FRAME if config.get("mm_use_im_start_end") else ("", "")
    return before + opened, f"{closed}\n{{prompt}}{template.after}"


def _prompt(config: Config, template: Template, cutter: Cutter, own: bool) -> PromptSpec:
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    answered = "{prompt}" + template.after

    def seen(before: str) -> tuple[str, ...]:
        head, tail = _around(config, template, before)
        if not begin and head.startswith(BEGIN_3):
            # tokenizer_image_token takes the template's begin token for the tokenizer's own, and
            # drops the first token of what follows the picture, as if that were another.
            tail = tail.removeprefix("\n")
        # LLaVA's own code tokenizes what stands on each side of the picture by itself.
        apart = (*cutter.cut(head), "{image}", *cutter.cut(tail))
        return (*begin, *(apart if own else cutter.cut(head + IMAGE + tail)))

    def unseen(before: str) -> tuple[str, ...]:
        return (*begin, *cutter.cut(before + answered))

    return PromptSpec(
        tasks=TASKS,
        template=seen(template.before),
        text_template=unseen(template.before),
        turn=cutter.cut(template.again + answered, goes_on=True),
        system_template=seen(template.system) if template.system else (),
        system_text_template=unseen(template.system) if template.system else (),
    )


def _several(template: Template, cutter: Cutter) -> PromptSpec:
    """The prompt in transformers' layout with every picture on a line of its own."""
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    answered = "{prompt}" + template.after

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text, goes_on=True)

    def seen(before: str) -> tuple[str, ...]:
        return (*begin, *cutter.cut(before), "{image}", *cut(answered))

    def unseen(before: str) -> tuple[str, ...]:
        return (*begin, *cutter.cut(before + answered))

    return PromptSpec(
        tasks=TASKS,
        template=seen(template.before),
        text_template=unseen(template.before),
        turn=(*cut(template.again), "{image}", *cut(answered)),
        text_turn=cut(template.again + answered),
        picture=PictureLayout(whole=cut(IMAGE + "\n")),
        reply="" if template.after.endswith("\n") else " ",
        system_template=seen(template.system) if template.system else (),
        system_text_template=unseen(template.system) if template.system else (),
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
    (re.compile(r"(?:model\.)?(image_newline)"), "projector."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)"), "projector.0."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)"), "projector.2."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)"), "decoder."),
    (re.compile(r"model\.((?:layers|embed_tokens|norm)\..+)"), "decoder."),
)
# CLIP's text tower and heads, the last norm (of CLIP's class token; of SigLIP behind the features),
# stored tables.
_UNUSED = re.compile(
    r".*vision_(?:model|tower)\.(?:(?:post_layernorm|head)\..+|embeddings\.position_ids)"
    rf"|{re.escape(TOWER)}(?:text_model\..+|logit_(?:scale|bias)|(?:visual|text)_projection\.weight)"
    r"|.+\.rotary_emb\.inv_freq"
)


locate = locating(_PARTS, _UNUSED)


def tower(source: Source) -> str | None:
    """The name in `mm_vision_tower`, unless the checkpoint holds a tower's tensors itself."""
    return None if _holds_tower(source) else named_tower(source)


def keep_tower(source: Source) -> None:
    """Raises ValueError where another vision tower was chosen than the one inside."""
    if any(name.startswith(TOWER) for name in source.shapes) and _holds_tower(source):
        raise ValueError("its own vision tower was trained with it; export it without another")


def _holds_tower(source: Source) -> bool:
    names = (locate(n) or "" for n in source.shapes if not n.startswith(TOWER))
    return any(name.startswith("vision.") for name in names)


def named_tower(source: Source) -> str | None:
    """See Family.processor."""
    config: Mapping[str, Any] = source.files["config.json"]
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    return str(name) if name else None
