"""Settings of a picture processor -> ImageSpec.

Knows what transformers' classes (4.57 and 5) do with their settings. What an ImageSpec cannot say
is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgevlm import schema
from edgevlm.family import Config, FileError
from edgevlm.processors import (
    DEEPSEEK_VL,
    GEMMA3,
    GOT_OCR2,
    IDEFICS3,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    PAN_AND_SCAN,
    PHI3_V,
    PREPROCESSOR,
    PROCESSOR,
    QWEN2_VL,
    SIGLIP,
    SMOLVLM,
    VLM,
    ProcessorSettings,
)
from edgevlm.specs import Fit, ImageSpec, MapSpec, NativeSpec, Resample, TileSpec

# Idefics3's classes, which cut pictures into tiles and make them RGB at last.
_IDEFICS = (IDEFICS3, SMOLVLM)
# Classes that cut pictures by pinpoints.
_PINNED = (LLAVA_NEXT, LLAVA_ONEVISION)
# Classes that resize a picture in its own shape and pad it after that.
_BOXED = (DEEPSEEK_VL, VLM)
# Settings that are true or false.
_SWITCHES = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_center_crop",
    "do_image_splitting",
    "crop_to_patches",
)

# PIL's numbers.
_RESAMPLE: dict[int, Resample] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


def image_spec(
    found: ProcessorSettings, side: int, tokens: int, *, pad: bool = False, max_pictures: int = 1
) -> ImageSpec:
    """Translates a processor's settings for a tower of `side` pixels, but for pinpoints.

    With `pad` its caller puts a picture into the middle of a square of the mean colour first, as
    LLaVA's own code does. Raises FileError.
    """
    values = found.values
    for key in _SWITCHES:
        if not isinstance(values.get(key, False), bool):
            raise found.refusal(key, "only true or false is known")
    pad = pad or bool(values.get("do_pad") if found.kind == LLAVA else False)
    # Of several pictures, which are not cut, it makes squares as a pad does.
    squares = pad or found.kind == LLAVA_ONEVISION
    mean, std = _channels(found, "image_mean"), _channels(found, "image_std")
    if 0 in std:
        raise found.refusal("image_std", "no channel's may be 0")
    fill = None
    if not values["do_normalize"]:
        fill = _colour(found, mean) if squares else None
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif squares:
        _colour(found, mean)
    if found.kind in _BOXED:
        fill = _box_colour(found)
    idefics = found.kind in _IDEFICS
    tiles = _tiles(found, side) if idefics else None
    if found.kind in _CUTTERS:
        tiles = _CUTTERS[found.kind](found)
    fit, resize = _fit(found, side, pad)
    return ImageSpec(
        size=side,
        tokens=tokens,
        mean=mean,
        std=std,
        resample=_resample(found),
        max_pictures=max_pictures,
        fit=fit,
        resize=resize if resize != side else 0,
        rescale=_rescale(found),
        fill=fill,
        tiles=tiles,
        rgb="last" if idefics else "first",
        native=native_spec(found) if found.kind == QWEN2_VL else None,
        **_box(found, side),
    )


def _box(found: ProcessorSettings, side: int) -> dict[str, Any]:
    """Settings that only a letterbox has."""
    if found.kind not in _BOXED:
        return {}
    if found.values["do_pad"] is not True:
        raise found.refusal("do_pad", "only true is known")
    shortest = _count(found, "min_size")
    if shortest > side:
        raise found.refusal("min_size", f"the vision tower takes {side} pixels")
    return {"shortest": shortest, "rounding": "share" if found.kind == VLM else "scale"}


def _box_colour(found: ProcessorSettings) -> tuple[int, int, int]:
    """The colour around a picture; grey where the file states no mean, whatever the class's is."""
    stated = found.stated.get("image_mean") is not None
    colour = _colour(found, _channels(found, "image_mean")) if stated else (127, 127, 127)
    said = found.values["background_color"]
    if said is not None and said != list(colour):
        raise found.refusal("background_color", f"the classes make it {list(colour)} of image_mean")
    return colour


def native_spec(found: ProcessorSettings) -> NativeSpec:
    """Qwen2-VL's bounds on the pixels of a picture or a frame, by either of their names; raises
    FileError.
    """
    size, bounds = found.values["size"], []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = size.get(edge) if isinstance(size, Mapping) and len(size) == 2 else None
        if type(value) is not int or value < 1:
            raise found.refusal("size", "only shortest_edge and longest_edge are known, in pixels")
        if found.values[key] is not None:
            stated, value = value, _count(found, key)
            if "size" in found.stated and stated != value:
                raise found.refusal(key, f"size says {stated}; remove the one that is wrong")
        bounds.append(value)
    if bounds[0] > bounds[1]:
        raise found.refusal("min_pixels", f"the most are {bounds[1]}")
    return NativeSpec(*bounds)


def _tiles(found: ProcessorSettings, side: int) -> TileSpec:
    """Idefics3's tiles of `side` pixels."""
    if _longest_edge(found, "max_image_size") != side:
        raise found.refusal("max_image_size", f"the vision tower takes {side} pixels")
    return TileSpec(
        "longest-edge", _longest_edge(found, "size"), split=found.values["do_image_splitting"]
    )


def _patches(found: ProcessorSettings) -> TileSpec:
    """GOT-OCR2's tiles, which InternVL's are: the picture itself stands behind them, squeezed."""
    least, most = (_count(found, key) for key in ("min_patches", "max_patches"))
    split = bool(found.values["crop_to_patches"]) and most > 1
    # Its resize() falls back to that whatever the file says.
    if split and found.values["resample"] != 3:
        raise found.refusal("resample", "tiles are always cut with 3 (bicubic)")
    return TileSpec("ratio", split=split, least=least, most=most, overview_of="picture")


def _parts(found: ProcessorSettings) -> TileSpec:
    """Gemma 3's pan and scan, which is off unless a caller asks for more tiles than one."""
    for key, known in PAN_AND_SCAN.items():
        if found.values[key] != known:
            raise found.refusal(
                key, f"Gemma3Processor ignores it and takes {known!r}; max_tiles cuts pictures"
            )
    most = int(PAN_AND_SCAN["pan_and_scan_max_num_crops"])
    return TileSpec("pan-and-scan", most=most, overview="first", overview_of="picture", max_tiles=1)


def _crops(found: ProcessorSettings) -> TileSpec:
    """Phi-3-Vision's tiles; the picture stands before them, squeezed from their pixels, and its
    embeddings last.
    """
    return TileSpec(
        "hd",
        most=_count(found, "num_crops"),
        overview="first",
        overview_of="pixels",
        fill=(255, 255, 255),
        map=MapSpec(separated=True),
    )


_CUTTERS: Mapping[str, Callable[[ProcessorSettings], TileSpec]] = {
    GOT_OCR2: _patches,
    GEMMA3: _parts,
    PHI3_V: _crops,
}


def _count(found: ProcessorSettings, key: str) -> int:
    value = found.values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise found.refusal(key, "only a number from 1 on is known")
    return value


def _longest_edge(found: ProcessorSettings, key: str) -> int:
    value = found.values[key]
    edge = value.get("longest_edge") if isinstance(value, Mapping) and len(value) == 1 else None
    if not isinstance(edge, int) or isinstance(edge, bool) or edge < 1:
        raise found.refusal(key, "only longest_edge is known")
    return edge


def check_rows(files: Mapping[str, Config], side: int, tokens: int) -> None:
    """Raises FileError where a processor writes another number of <image> for a picture than the
    `tokens` image embeddings of the model: transformers stops there.
    """
    processor = files.get(PROCESSOR, {})
    nested = processor.get("image_processor") or {}
    for file, stated in (
        (PREPROCESSOR, files.get(PREPROCESSOR, {})),
        (PROCESSOR, nested),
        (PROCESSOR, processor),
    ):
        if stated.get("image_seq_length", tokens) != tokens:
            said = f"image_seq_length is {stated['image_seq_length']!r}"
            raise FileError(file, f"{said}, config.json makes {tokens} image embeddings")
    if processor.get("image_token", "<image>") != "<image>":
        raise FileError(
            PROCESSOR, f"image_token is {processor['image_token']!r}; only <image> is known"
        )
    patch = processor.get("patch_size")
    if patch is None:
        return
    strategy = processor.get("vision_feature_select_strategy")
    # Files of before 4.47 do not have it, and meant 1.
    more = processor.get("num_additional_image_tokens", 1)
    for key, number in (("patch_size", patch), ("num_additional_image_tokens", more)):
        if type(number) is not int or number < (key == "patch_size"):
            raise FileError(PROCESSOR, f"{key} is {number!r}; only a whole number is known")
    rows = (side // patch) ** 2 + more - (strategy == "default")
    if rows != tokens:
        raise FileError(
            PROCESSOR,
            f"patch_size {patch!r}, num_additional_image_tokens {more!r} and "
            f"vision_feature_select_strategy {strategy!r} make {rows} image embeddings, "
            f"config.json {tokens}",
        )


def _fit(found: ProcessorSettings, side: int, pad: bool) -> tuple[Fit, int]:
    """The way a picture becomes a square, and the side that it is resized to."""
    if not found.values["do_resize"]:
        raise found.refusal("do_resize", "only true is known")
    if found.kind in (*_IDEFICS, QWEN2_VL, PHI3_V):
        return "stretch", side
    if found.kind in _BOXED:
        key = "image_size" if found.kind == VLM else "size"
        if _square(found, key, found.values[key]) != side:
            raise found.refusal(key, f"the vision tower takes {side} pixels")
        return "letterbox", side
    resize, keeps_shape = _size(found)
    if found.kind in _PINNED:
        # Tiles are as large as what would be cut out, whether it is or not.
        for key, value in (("size", resize), ("crop_size", _cut_side(found, side))):
            if value != side:
                raise found.refusal(key, f"the vision tower takes {side} pixels")
        return "stretch", side
    cuts = found.values.get("do_center_crop", False)
    if cuts:
        cut = _square(found, "crop_size", found.values["crop_size"])
        if cut != side:
            raise found.refusal("crop_size", f"the vision tower takes {side} pixels")
        if resize < cut:
            raise found.refusal("size", f"no less than crop_size ({cut}) is known")
    elif keeps_shape and not pad:
        raise found.refusal(
            "do_center_crop", "size keeps a picture's shape, the tower takes squares"
        )
    elif resize != side:
        raise found.refusal("size", f"the vision tower takes {side} pixels")
    return "pad" if pad else "crop" if keeps_shape else "stretch", resize


def _cut_side(found: ProcessorSettings, side: int) -> int:
    """The side that is cut out; `side` where the class has no such key."""
    return _square(found, "crop_size", found.values.get("crop_size", side))


def _size(found: ProcessorSettings) -> tuple[int, bool]:
    """The side that a picture is resized to, and whether it is the short side of its own shape."""
    size = found.values["size"]
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    elif not isinstance(size, int):
        return _square(found, "size", size), False
    if found.kind == SIGLIP or isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise found.refusal("size", "only height and width are known of this class")
    return size, True


def _square(found: ProcessorSettings, key: str, size: Any) -> int:
    if isinstance(size, Mapping):
        sides = [size["height"], size["width"]] if set(size) == {"height", "width"} else []
    else:
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
    if len(sides) != 2 or not whole or sides[0] != sides[1]:
        raise found.refusal(key, "only a square (height and width) is known")
    return int(sides[0])


def _resample(found: ProcessorSettings) -> Resample:
    number = found.values["resample"]
    if type(number) is not int or number not in _RESAMPLE:
        names = ", ".join(f"{n} ({name})" for n, name in _RESAMPLE.items())
        raise found.refusal("resample", f"only {names} are known")
    return _RESAMPLE[number]


def _rescale(found: ProcessorSettings) -> float:
    if not found.values["do_rescale"]:
        return 1.0
    factor = found.values["rescale_factor"]
    if not _is_number(factor) or factor <= 0:
        raise found.refusal("rescale_factor", "only a number above 0 is known")
    return float(factor)


def _channels(found: ProcessorSettings, key: str) -> tuple[float, float, float]:
    value = found.values[key]
    three = [value] * 3 if _is_number(value) else value
    if not isinstance(three, (list, tuple)) or len(three) != 3 or not all(map(_is_number, three)):
        raise found.refusal(key, "only a number or three are known")
    return float(three[0]), float(three[1]), float(three[2])


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and schema.finite(value)


def _colour(found: ProcessorSettings, mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean as the colour of a square."""
    if not all(0 <= x <= 1 for x in mean):
        raise found.refusal("image_mean", "a picture is padded with it, so only 0 to 1 is known")
    red, green, blue = (int(x * 255) for x in mean)
    return red, green, blue
