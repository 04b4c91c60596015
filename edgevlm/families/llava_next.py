"""LLaVA-NeXT (LLaVA-1.6): LLaVA's shape with pictures in tiles, in both layouts.

Facts from haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT and transformers 4.57 (models/llava_next).
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm import llava_shape, pinpoints
from edgevlm.family import Config, Family, FileError, Model, Source, section
from edgevlm.image_specs import check_rows, image_spec
from edgevlm.parts.clip import ClipTower
from edgevlm.processors import LLAVA_NEXT, default_settings, find_settings
from edgevlm.specs import ImageSpec, MapSpec

# The last is what LLaVA called its models at first.
_OWN = ("llava_llama", "llava_mistral", "llava")
# transformers sets no bound; the context does.
_MAX_PICTURES = 64


def _describe(source: Source) -> Model:
    own = llava_shape.is_own(source.files["config.json"])
    model = llava_shape.describe(source, _template(source), _image, several=not own)
    if model.vision.rows != model.vision.grid**2:
        raise ValueError("the class token's row is read, which has no place among tiles")
    return replace(model, projector=llava_shape.anyres(model.projector))


def _template(source: Source) -> str:
    """The template that models of this decoder and layout were trained with."""
    config, added = source.files["config.json"], source.tokenizer.added
    own = llava_shape.is_own(config)
    if "<|start_header_id|>" in added:
        return "llava_llama_3" if own else "next_llama3"
    if "<|im_start|>" in added:
        return "chatml_direct"
    decoder = config if own else section(config, "text_config")
    if "mistral" not in str(decoder.get("model_type")):
        return "llava_v1"
    return "mistral_instruct" if own else "next_mistral"


def _image(
    source: Source, vision: ClipTower, tokens: int, own: bool
) -> tuple[ImageSpec, tuple[str, ...]]:
    """See llava_shape.Pictures."""
    if source.fit:
        raise ValueError("LLaVA-NeXT has one fit of pictures")
    config, side = source.files["config.json"], vision.image_size
    if own:
        return _own_image(source, config, side, tokens)
    if config.get("use_image_newline_parameter") is False:
        raise ValueError("use_image_newline_parameter is False; only true is known")
    notes: tuple[str, ...] = ()
    found = find_settings(source.files, LLAVA_NEXT, (LLAVA_NEXT,))
    if found is None:
        found, notes = default_settings(LLAVA_NEXT, side)
    check_rows(source.files, side, tokens)
    tiles = pinpoints.tiles(pinpoints.stated(found, config, side), MapSpec(digits=pinpoints.DIGITS))
    image = image_spec(found, side, tokens, max_pictures=_MAX_PICTURES)
    return replace(image, tiles=tiles), notes


def _own_image(
    source: Source, config: Config, side: int, tokens: int
) -> tuple[ImageSpec, tuple[str, ...]]:
    tiles = pinpoints.own_tiles(config, side)
    llava_shape.keep_tower(source)
    found, notes = llava_shape.own_settings(source, side)
    image = image_spec(found, side, tokens)
    # Pillow's default, whatever CLIP's processor says; that has nothing left to resize.
    if (image.fit, image.resize, image.resample) != ("crop", 0, "bicubic"):
        raise FileError(found.file, f"only squares of {side} pixels, resized bicubic, are known")
    return replace(image, fit="stretch", tiles=tiles), notes


def _claims(config: Config) -> bool:
    """True for a config in LLaVA's own layout that takes pictures in tiles."""
    ratio = config.get("image_aspect_ratio")
    own = llava_shape.is_own(config) and not llava_shape.is_own_qwen(config)
    return own and isinstance(ratio, str) and ratio.startswith("anyres")


FAMILY = Family(
    name="llava_next",
    license="other",
    model_types=("llava_next", *_OWN),
    describe=_describe,
    locate=llava_shape.locate,
    tower=llava_shape.tower,
    processor=llava_shape.named_tower,
    claims=_claims,
)
