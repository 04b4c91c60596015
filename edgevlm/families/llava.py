"""LLaVA's shape: a CLIP tower, a small connector, a LLaMA-like decoder that reads causally.

MobilePALO and PALO, MobileVLM and MobileVLM V2, LLaVA-1.5 in its own layout and in transformers',
and what differs from them only in its decoder: LLaMA-3, Mistral, Phi-3. Facts from
haotian-liu/LLaVA, mbzuai-oryx/PALO and LLaVA-pp, Meituan-AutoML/MobileVLM and transformers 4.57
(models/llava).
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm import llava_shape
from edgevlm.family import Family, Model, Source
from edgevlm.image_specs import check_rows, image_spec
from edgevlm.parts.clip import ClipTower
from edgevlm.processors import CLIP, LLAVA, SIGLIP, default_settings, find_settings
from edgevlm.specs import ImageSpec


def _describe(source: Source) -> Model:
    return llava_shape.describe(source, _template(source), _image)


def _template(source: Source) -> str:
    """The template that models of this decoder and layout were trained with."""
    own = llava_shape.is_own(source.files["config.json"])
    if "<|start_header_id|>" in source.tokenizer.added:
        return "llava_llama3" if own else "llama3"
    if "<|assistant|>" in source.tokenizer.added:
        return "phi3_instruct" if own else "phi3"
    return "vicuna_v1" if own else "hf"


def _image(
    source: Source, vision: ClipTower, tokens: int, own: bool
) -> tuple[ImageSpec, tuple[str, ...]]:
    """See llava_shape.Pictures."""
    side, ratio = vision.image_size, source.files["config.json"].get("image_aspect_ratio")
    if ratio not in (None, "square", "pad"):
        raise ValueError(f"image_aspect_ratio {ratio!r} is not known; LLaVA-1.5 has pad or square")
    if own:
        found, notes = llava_shape.own_settings(source, side)
    elif stated := find_settings(source.files, LLAVA, (CLIP, LLAVA, SIGLIP)):
        found, notes = stated, ()
    else:
        found, notes = default_settings(CLIP, side)
    if not own:
        check_rows(source.files, side, tokens)
    if source.fit == "crop" and found.kind == LLAVA:
        found = replace(found, values={**found.values, "do_pad": False})
    pad = source.fit == "pad" or (source.fit is None and own and ratio == "pad")
    image = image_spec(found, side, tokens, pad=pad)
    if source.fit not in (None, image.fit):
        raise ValueError(f"the fit {source.fit!r} is not that of its processor, {image.fit!r}")
    return image, notes


FAMILY = Family(
    name="llava",
    license="other",
    model_types=(*llava_shape.OWN_LAYOUT, "llava"),
    describe=_describe,
    locate=llava_shape.locate,
    tower=llava_shape.tower,
    processor=llava_shape.named_tower,
)
