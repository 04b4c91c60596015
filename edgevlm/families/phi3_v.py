"""Phi-3-Vision and Phi-3.5-Vision: CLIP-L/14 on tiles, two linear maps, a Phi-3 decoder.

Facts from the code that is published with the checkpoints (modeling_phi3_v.py,
image_embedding_phi3_v.py, processing_phi3_v.py), which no release of transformers has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import decoders
from edgevlm.family import (
    Config,
    Family,
    Model,
    Source,
    decoder_spec,
    locating,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image_specs import image_spec
from edgevlm.parts.clip import CLIP_TOWER, ClipTower
from edgevlm.parts.hd_mlp import HdMlp
from edgevlm.parts.phi3 import Phi3
from edgevlm.processors import PHI3_V, PREPROCESSOR, default_settings, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec
from edgevlm.templates import IMAGE, TEMPLATES, Cutter, Spaces

# The one tower that the original's code has, whose sizes no config states.
_CLIP_L = replace(
    CLIP_TOWER,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_HEAD = _CLIP_L.hidden_size // _CLIP_L.num_attention_heads
_TOWER = "model.vision_embed_tokens.img_processor.vision_model."
# What config.json may say of no other value.
_EMBEDDING: Mapping[str, Any] = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_PROCESSOR: Mapping[str, Any] = {
    "name": "clip_vision_model",
    "model_name": "openai/clip-vit-large-patch14-336",
    "type_feature": "patch",
}
# Where the original's code has a default, and another one than what is known.
_DEFAULTS: Mapping[str, Any] = {"type_feature": "patch", "embedding_cls": "image"}
_CROPS = "num_crops"
_SETTINGS = {
    _CROPS: "the most tiles of a picture beside its overview; the models' cards propose 16 for "
    "single pictures and 4 for several"
}
_MOST_CROPS = 64
_TEMPLATE = "phi3"
_PLACEHOLDER = "<|image|>"
# The original sets no bound; the context does.
_MAX_PICTURES = 64
_TASKS = {"caption": "Describe the image.", "ocr": "What is the text in the image?"}


def _describe(source: Source) -> Model:
    if source.fit or source.template not in (None, _TEMPLATE):
        raise ValueError("Phi-3-Vision has one prompt template and one fit of pictures")
    config = source.files["config.json"]
    _check(config, "embd_layer", _EMBEDDING)
    _check(config, "img_processor", _PROCESSOR)
    text = decoders.read({**config, "model_type": "phi3"}, "phi3")
    assert isinstance(text, Phi3)
    vision = _vision(source, config)
    projector = HdMlp(in_features=vision.hidden_size, out_features=text.hidden_size)
    image, notes = _image(source, vision, projector)
    stops = stop_tokens(source.files, config, decoders.EOS["phi3"])
    cutter = Cutter(source.tokenizer, _spaces(source), stops[0])
    template, added = TEMPLATES[_TEMPLATE], source.tokenizer.added
    return Model(
        image=image,
        prompt=_prompt(cutter),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(
            stop_tokens=tuple(dict.fromkeys((cutter.end(template), *stops))), max_tokens=512
        ),
        vision=vision,
        projector=projector,
        text=text,
        markers={added[_PLACEHOLDER].id: _PLACEHOLDER} if _PLACEHOLDER in added else {},
        prefix="" if source.tokenizer.bytes else " ",
        prefix_once=cutter.spaces == "first",
        original=f"{template.before}{IMAGE}\n{{prompt}}{template.after}",
        notes=notes,
    )


def _check(config: Config, key: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError where a section says what the exporter would convert wrongly."""
    stated = section(config, key)
    for name, value in known.items():
        found = stated.get(name, _DEFAULTS.get(name))
        if found != value:
            raise ValueError(f"{key}.{name} is {found!r}; only {value!r} is known")


def _vision(source: Source, config: Config) -> ClipTower:
    """The tower as far as its features are read, by the shapes of its tensors."""
    shapes = {
        name.removeprefix(_TOWER): shape
        for name, shape in source.shapes.items()
        if name.startswith(_TOWER)
    }
    found = _inside(shapes) if shapes else _CLIP_L
    stated = section(config, "img_processor")
    width = setting(stated, "image_dim_out", found.hidden_size)
    if width != found.hidden_size:
        raise ValueError(
            f"img_processor.image_dim_out is {width}, the vision tower's is {found.hidden_size}"
        )
    if found.grid % 2:
        raise ValueError(f"the vision tower has {found.grid} patches a side; only even ones join")
    layer, depth = setting(stated, "layer_idx", -2), found.num_hidden_layers
    read = layer if layer >= 0 else depth + 1 + layer
    if not 0 < read <= depth:
        raise ValueError(f"img_processor.layer_idx {layer} is not one of a tower of {depth}")
    return replace(found, num_hidden_layers=read, depth=depth)


def _inside(shapes: Mapping[str, tuple[int, ...]]) -> ClipTower:
    try:
        width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        mlp, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError("it holds no vision tower; download it again") from None
    layers = [int(m[1]) for n in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", n))]
    return replace(
        _CLIP_L,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=max(width // _HEAD, 1),
        num_channels=channels,
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
    )


def _image(
    source: Source, vision: ClipTower, projector: HdMlp
) -> tuple[ImageSpec, tuple[str, ...]]:
    """The picture's spec, and a note where somebody else than the checkpoint states the tiles."""
    found, notes = find_settings(source.files, PHI3_V, (PHI3_V,)), tuple[str, ...]()
    chosen = source.settings.get(_CROPS)
    if found is None and chosen is None:
        raise ValueError(
            f"no {PREPROCESSOR}, which says into how many tiles pictures are cut; state it "
            f"(--set {_CROPS}=16)"
        )
    if found is None:
        found, notes = default_settings(PHI3_V, vision.image_size)
    if chosen is not None:
        most = int(chosen) if re.fullmatch("[0-9]{1,4}", chosen) else 0
        if not 1 <= most <= _MOST_CROPS:
            raise ValueError(f"{_CROPS} {chosen!r} is not a number from 1 to {_MOST_CROPS}")
        found = replace(found, values={**found.values, _CROPS: most})
        notes = (*notes, f"pictures are cut into {most} tiles at most, as stated")
    tokens = projector.tokens(vision.rows)
    return image_spec(found, vision.image_size, tokens, max_pictures=_MAX_PICTURES), notes


def _spaces(source: Source) -> Spaces:
    if source.tokenizer.bytes:
        return "none"
    legacy = source.files.get("tokenizer_config.json", {}).get("legacy") is not False
    return source.tokenizer.prepends or ("every" if legacy else "first")


def _prompt(cutter: Cutter) -> PromptSpec:
    """The prompt: what stands before the first picture, between two and behind the last one is
    tokenized each by itself, with a begin token of its own.
    """
    template = TEMPLATES[_TEMPLATE]
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    answered = "{prompt}" + template.after

    def seen(before: str, *, goes_on: bool = False) -> tuple[str, ...]:
        opened = cutter.cut(before, goes_on=goes_on)
        return (*opened, "{image}", *cutter.cut(answered, goes_on=True))

    after = cutter.cut(template.after, goes_on=True)
    spaced = cutter.spaces == "every" and after[-1].startswith("{id:")
    return PromptSpec(
        tasks=_TASKS,
        template=(*begin, *seen(template.before)),
        text_template=(*begin, *cutter.cut(template.before + answered)),
        turn=seen(template.again, goes_on=True),
        text_turn=cutter.cut(template.again + answered, goes_on=True),
        picture=PictureLayout(whole=("{image}", *begin, *cutter.cut("\n"))),
        reply=" " if spaced else "",
        system_template=(*begin, *seen(template.system)),
        system_text_template=(*begin, *cutter.cut(template.system + answered)),
    )


_PARTS = (
    (re.compile(re.escape(_TOWER) + "(.+)"), "vision."),
    (re.compile(r"model\.vision_embed_tokens\.(wte\.weight)"), "decoder."),
    (re.compile(r"(lm_head\.weight)"), "decoder."),
    (re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)"), "decoder."),
)
_NAMES = {
    "img_projection.0.": "linear_1.",
    "img_projection.2.": "linear_2.",
    "sub_GN": "newline",
    "glb_GN": "separator",
}
_UNUSED = re.compile(
    re.escape(_TOWER) + r"(?:post_layernorm\..+|embeddings\.position_ids)"
    r"|.+\.rotary_emb\.inv_freq"
)
_located = locating(_PARTS, _UNUSED)


def _locate(name: str) -> str | None:
    own = name.removeprefix("model.vision_embed_tokens.")
    if own != name:
        for theirs, ours in _NAMES.items():
            if own.startswith(theirs):
                return f"projector.{ours}{own.removeprefix(theirs)}"
    return _located(name)


FAMILY = Family(
    name="phi3_v",
    license="mit",
    model_types=("phi3_v",),
    describe=_describe,
    locate=_locate,
    settings=_SETTINGS,
)
