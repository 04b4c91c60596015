"""A checkpoint's own picture processor -> ImageSpec.

Knows the keys of preprocessor_config.json and of processor_config.json, and what transformers'
classes (4.57 and 5) do with them. What an ImageSpec cannot say is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.family import Config, FileError
from edgevlm.specs import Fit, ImageSpec, Resample, TileSpec

PREPROCESSOR, PROCESSOR = PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CLIP, SIGLIP, LLAVA = "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"
IDEFICS3, SMOLVLM = "Idefics3ImageProcessor", "SmolVLMImageProcessor"
GOT_OCR2 = "GotOcr2ImageProcessor"
LLAVA_NEXT, LLAVA_ONEVISION = "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"
PINPOINTS = "image_grid_pinpoints"

# openai/CLIP's normalisation, and the one that transformers calls IMAGENET_STANDARD.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
# Idefics3's classes, which cut pictures into tiles and make them RGB at last.
_IDEFICS = (IDEFICS3, SMOLVLM)
# Classes that cut pictures by pinpoints.
_PINNED = (LLAVA_NEXT, LLAVA_ONEVISION)
# PIL's numbers.
_RESAMPLE: dict[int, Resample] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_CLIP_DEFAULTS = _COMMON | {
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}
_IDEFICS3_DEFAULTS = _COMMON | {
    "resample": 1,
    "image_mean": _HALF,
    "image_std": _HALF,
    "size": {"longest_edge": 4 * 364},
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
}
# What a class does where its file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    CLIP: _CLIP_DEFAULTS,
    LLAVA: _CLIP_DEFAULTS | {"do_pad": False},
    SIGLIP: _COMMON
    | {"image_mean": _HALF, "image_std": _HALF, "size": {"height": 224, "width": 224}},
    LLAVA_NEXT: _CLIP_DEFAULTS
    | {
        PINPOINTS: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        # Published files have it, no release reads it.
        "aspect_ratio_setting": "anyres",
    },
    LLAVA_ONEVISION: _COMMON
    | {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
        PINPOINTS: [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
        "aspect_ratio_setting": "anyres",
    },
    IDEFICS3: _IDEFICS3_DEFAULTS,
    SMOLVLM: _IDEFICS3_DEFAULTS,
    GOT_OCR2: _COMMON
    | {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
        # What an integer as `size` means, which this class takes for the side of a square.
        "default_to_square": True,
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
    },
}
# Settings that are true or false.
_SWITCHES = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_center_crop",
    "do_image_splitting",
    "crop_to_patches",
)
# Keys that change no pixel: names, and what a call may be given. Pictures are RGB here already, and
# `do_pad` of a class that is not LLaVA's brings pictures of one batch to one size.
_INERT = (
    "processor_class",
    "_processor_class",
    "image_processor_type",
    "feature_extractor_type",
    "_valid_processor_keys",
    "_valid_kwargs_names",
    "model_input_names",
    "transformers_version",
    "backend",
    "device",
    "disable_grouping",
    "return_tensors",
    "input_data_format",
    "do_convert_rgb",
    "do_pad",
    "image_seq_length",
    "video_sampling",
)


# Keys whose null is the class's default in every release.
_MAY_BE_NULL = ("size", "crop_size", "image_mean", "image_std")


@dataclass(frozen=True)
class ProcessorSettings:
    """A picture processor's class, every setting of it, and the file that states them ("" where
    there is none).
    """

    file: str
    kind: str
    values: Mapping[str, Any]
    stated: Config

    def refusal(self, key: str, known: str) -> FileError:
        """The error for a setting that no ImageSpec can say."""
        absent = "" if key in self.stated else f" (the default of a {self.kind})"
        return FileError(self.file, f"{key} is {self.values.get(key)!r}{absent}; {known}")


def default_settings(
    kind: str, side: int, beside: str = ""
) -> tuple[ProcessorSettings, tuple[str, ...]]:
    """A class's settings for a tower of `side` pixels where no file states any, and a note of it
    for the manifest, with what is known `beside`.
    """
    values = dict(_DEFAULTS[kind])
    if "crop_size" in values:
        values |= {"size": {"shortest_edge": side}, "crop_size": side}
    else:
        values["size"] = {"height": side, "width": side}
    note = f"no {PREPROCESSOR}: pictures as {kind} reads them unless told{beside}"
    return ProcessorSettings("", kind, values, {}), (note,)


def find_settings(
    files: Mapping[str, Config], default: str, known: Collection[str], folder: str = ""
) -> ProcessorSettings | None:
    """The settings in the files of a folder ("" or TOWER), None where there are none.

    `default` is the class where no file names one, `known` are those that the family's code runs.
    Raises FileError.
    """
    plain, nested = folder + PREPROCESSOR, folder + PROCESSOR
    found = [] if plain not in files else [_settings(plain, files[plain], default, known)]
    inside = files.get(nested, {}).get("image_processor")
    if inside is not None:
        if not isinstance(inside, Mapping):
            raise FileError(nested, f"image_processor is {inside!r}, not an object")
        found.append(_settings(nested, inside, default, known))
    if len(found) == 2:
        _check_same(*found)
    return found[0] if found else None


def _check_same(plain: ProcessorSettings, nested: ProcessorSettings) -> None:
    """Refuses two files that differ: transformers 4 reads the one and 5 the other."""
    a, b = _comparable(plain), _comparable(nested)
    for key in a:
        if a[key] != b.get(key, a[key]):
            raise FileError(
                nested.file,
                f"{key} is {b[key]!r}, but {a[key]!r} in {PREPROCESSOR}; remove the file that is "
                "not the model's",
            )


def _comparable(found: ProcessorSettings) -> dict[str, Any]:
    """The settings, those that may be written in several ways in one of them."""
    values = {"image_processor_type": found.kind}
    values |= {key: found.values[key] for key in _DEFAULTS[found.kind]}
    for key, whole in (("size", "shortest_edge"), ("crop_size", "")):
        value = values.get(key)
        if isinstance(value, int):
            values[key] = {whole: value} if whole else {"height": value, "width": value}
        elif isinstance(value, list) and len(value) == 2:
            values[key] = {"height": value[0], "width": value[1]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _settings(file: str, stated: Config, default: str, known: Collection[str]) -> ProcessorSettings:
    named = stated.get("image_processor_type") or stated.get("feature_extractor_type") or default
    kind = str(named).removesuffix("Fast").removesuffix("Pil")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    if stated.get("auto_map"):
        raise FileError(
            file, f"auto_map is {stated['auto_map']!r}; code of a checkpoint is not run"
        )
    if kind not in known:
        raise FileError(
            file, f"image_processor_type is {named!r}; only {' or '.join(known)} is known"
        )
    values = dict(_DEFAULTS[kind])
    for key, value in stated.items():
        if value is not None:
            values[key] = value
        elif values.get(key) and key not in _MAY_BE_NULL:
            raise FileError(file, f"{key} is null, which transformers 4 and 5 read differently")
    found = ProcessorSettings(file, kind, values, stated)
    for key in stated:
        if key not in _DEFAULTS[kind] and key not in _INERT and _means_something(key, stated[key]):
            raise found.refusal(key, f"a {kind} ignores it; remove it if the model was trained so")
    return found


def _means_something(key: str, value: Any) -> bool:
    usual = {"data_format": "channels_first", "default_to_square": False}
    # What would be cut out is stated where nothing is cut, too.
    return key != "crop_size" and bool(value) and value != usual.get(key)


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
    idefics = found.kind in _IDEFICS
    tiles = _tiles(found, side) if idefics else _patches(found) if found.kind == GOT_OCR2 else None
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
    )


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
    if found.kind in _IDEFICS:
        return "stretch", side
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
    return plain and math.isfinite(value)


def _colour(found: ProcessorSettings, mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean as the colour of a square."""
    red, green, blue = (int(x * 255) for x in mean)
    if not all(0 <= x <= 255 for x in (red, green, blue)):
        raise found.refusal("image_mean", "a picture is padded with it, so only 0 to 1 is known")
    return red, green, blue
