"""The keys by which LLaVA-NeXT and LLaVA-OneVision cut pictures -> TileSpec.

Facts from transformers 4.57 (LlavaNextImageProcessor, LlavaOnevisionImageProcessor) and LLaVA's and
LLaVA-NeXT's own code (llava/mm_utils.py).
"""

from __future__ import annotations

import re
from typing import Any

from edgevlm.family import Config
from edgevlm.processors import PINPOINTS, ProcessorSettings
from edgevlm.specs import MapSpec, TileSpec

Canvases = tuple[tuple[int, int], ...]

# From so many tiles to so many, and a list as text.
_RANGE = re.compile(r"\((\d+)x(\d+)\)(?:[^x]*\((\d+)x(\d+)\))?")
_PAIR = re.compile(r"[(\[](\d+),(\d+)[)\]]")
_LIST = re.compile(rf"[(\[](?:{_PAIR.pattern},?)+[)\]]")

# LLaVA's code takes pictures in tiles by this value of image_aspect_ratio, LLaVA-NeXT's also with a
# number of tiles that their map is resized to.
_ANYRES = re.compile(r"anyres(?:_max_([1-9]\d*))?")
_RATIO, _MERGE, _UNPAD = "image_aspect_ratio", "mm_patch_merge_type", "spatial_unpad"
# transformers rounds the lengths that it cuts off (modeling_llava_next and
# modeling_llava_onevision, unpad_image).
DIGITS = 7


def tiles(canvases: Canvases, joined: MapSpec) -> TileSpec:
    """The cutting of a picture on canvases, whose tiles' embeddings are joined so."""
    return TileSpec(
        "pinpoints", overview="first", overview_of="picture", canvases=canvases, map=joined
    )


def own_tiles(config: Config, side: int) -> TileSpec:
    """The cutting that LLaVA's own config.json states; raises ValueError."""
    ratio = _ANYRES.fullmatch(str(config.get(_RATIO)))
    if ratio is None:
        raise ValueError(
            f"{_RATIO} {config.get(_RATIO)!r} is not known; only anyres and anyres_max_<N> are"
        )
    if config.get(_MERGE) != _UNPAD:
        raise ValueError(f"{_MERGE} is {config.get(_MERGE)!r}; only {_UNPAD} is known")
    return tiles(_own(config, side), MapSpec(most=int(ratio[1] or 0)))


def stated(found: ProcessorSettings, config: Config, side: int) -> Canvases:
    """The canvases of a picture processor, heights before widths, in tiles of `side` pixels.

    The model cuts its map by config.json's. Raises FileError where that has others.
    """
    value = found.values[PINPOINTS]
    if found.values.get("aspect_ratio_setting", "anyres") != "anyres":
        raise found.refusal("aspect_ratio_setting", "only anyres is known")
    if config.get(PINPOINTS, value) not in (value, None):
        raise found.refusal(PINPOINTS, f"config.json has {config[PINPOINTS]!r}")
    heights_first = _checked(value, side)
    if heights_first is None:
        raise found.refusal(PINPOINTS, f"only pairs of multiples of {side} pixels are known")
    return tuple((width, height) for height, width in heights_first)


def _own(config: Config, side: int) -> Canvases:
    """Those of LLaVA's own config.json, widths first: a list, or a text with a list or a range of
    numbers of tiles.
    """
    value = config.get(PINPOINTS)
    pairs: Any = value
    if isinstance(value, str):
        text = re.sub(r"\s", "", value)
        if found := _RANGE.fullmatch(text):
            low = int(found[1]), int(found[2])
            high = int(found[3] or low[0]), int(found[4] or low[1])
            pairs = [
                [columns * side, rows * side]
                for columns in range(low[0], high[0] + 1)
                for rows in range(low[1], high[1] + 1)
            ]
        elif _LIST.fullmatch(text):
            pairs = [[int(width), int(height)] for width, height in _PAIR.findall(text)]
    canvases = _checked(pairs, side)
    if canvases is None:
        raise ValueError(
            f"{PINPOINTS} is {value!r}; only pairs of multiples of {side} pixels and ranges as "
            "(1x1),...,(6x6) are known"
        )
    return canvases


def _checked(pairs: Any, side: int) -> Canvases | None:
    """The pairs, None where they are not pairs of numbers of pixels in whole tiles."""
    if not isinstance(pairs, list) or not pairs:
        return None
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        if not all(type(n) is int and n > 0 and n % side == 0 for n in pair):
            return None
    return tuple((first, second) for first, second in pairs)
