"""A checkpoint's own picture processor, as its files and its class's defaults have it.

Knows the keys of preprocessor_config.json and of processor_config.json as transformers (4.57 and 5)
reads them; image_specs.py makes an ImageSpec of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.family import Config, FileError

PREPROCESSOR, PROCESSOR = PROCESSORS = ("preprocessor_config.json", "processor_config.json")
VIDEO_PROCESSOR = "video_preprocessor_config.json"
CLIP, SIGLIP, LLAVA = "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"
IDEFICS3, SMOLVLM = "Idefics3ImageProcessor", "SmolVLMImageProcessor"
GOT_OCR2 = "GotOcr2ImageProcessor"
LLAVA_NEXT, LLAVA_ONEVISION = "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"
GEMMA3 = "Gemma3ImageProcessor"
# transformers' class, and the one of the original's code.
DEEPSEEK_VL, VLM = "DeepseekVLImageProcessor", "VLMImageProcessor"
QWEN2_VL = "Qwen2VLImageProcessor"
# A class that every checkpoint brings with it; it is known here and not run.
PHI3_V = "Phi3VImageProcessor"
PINPOINTS = "image_grid_pinpoints"

# openai/CLIP's normalisation, and the one that transformers calls IMAGENET_STANDARD.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
# What Gemma3Processor tells a Gemma3ImageProcessor, whatever stands in its file.
PAN_AND_SCAN: dict[str, Any] = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
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
    GEMMA3: _COMMON
    | {
        "resample": 2,
        "image_mean": _HALF,
        "image_std": _HALF,
        "size": {"height": 224, "width": 224},
        "default_to_square": True,
        **PAN_AND_SCAN,
    },
    DEEPSEEK_VL: _COMMON
    | {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
        "default_to_square": True,
        "min_size": 14,
        "do_pad": True,
        # Files have it, and both classes compute it.
        "background_color": None,
    },
    QWEN2_VL: _COMMON
    | {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        # In their place, and before them.
        "min_pixels": None,
        "max_pixels": None,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    PHI3_V: {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "num_crops": 1,
        # Of a picture that is not cut, which its processor never makes.
        "num_img_tokens": None,
    },
    VLM: {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_size": None,
        "min_size": 14,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "background_color": None,
    },
}
# What a class does and its file cannot say.
_FIXED: dict[str, dict[str, Any]] = {
    VLM: {"do_resize": True, "resample": 3, "do_rescale": True, "do_pad": True},
    PHI3_V: {
        "do_resize": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    },
}
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
_MAY_BE_NULL = ("size", "crop_size", "image_mean", "image_std", *PAN_AND_SCAN)


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
    values = _FIXED.get(kind, {}) | _DEFAULTS[kind]
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


def video_settings(
    files: Mapping[str, Config], pictures: ProcessorSettings, defaults: Mapping[str, Any]
) -> ProcessorSettings:
    """Settings of a processor of videos, which transformers reads from its own file, or from that
    of pictures where there is none. `defaults` are its class's where that of pictures has others.

    Raises FileError for frames that are not made into pixels as pictures are.
    """
    nested = files.get(PROCESSOR, {}).get("video_processor")
    named = ((VIDEO_PROCESSOR, files.get(VIDEO_PROCESSOR)), (PROCESSOR, nested))
    others: tuple[tuple[str, Any], ...] = ((PREPROCESSOR, files.get(PREPROCESSOR)), (PROCESSOR, {}))
    file, given = next((f, c) for f, c in (*named, *others) if c is not None)
    if not isinstance(given, Mapping):
        raise FileError(file, f"video_processor is {given!r}, not an object")
    stated = {key: value for key, value in given.items() if value is not None}
    found = ProcessorSettings(
        file, pictures.kind, {**pictures.values, **defaults, **stated}, stated
    )
    for key in pictures.values.keys() - {*defaults}:
        own, other = (
            list(v) if isinstance(v, tuple) else v
            for v in (found.values[key], pictures.values[key])
        )
        if own != other:
            raise found.refusal(key, f"that of pictures is {other!r}, only the same is known")
    return found


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
    if stated.get("auto_map") and kind != PHI3_V:
        raise FileError(
            file, f"auto_map is {stated['auto_map']!r}; code of a checkpoint is not run"
        )
    if kind not in known:
        raise FileError(
            file, f"image_processor_type is {named!r}; only {' or '.join(known)} is known"
        )
    values = _FIXED.get(kind, {}) | _DEFAULTS[kind]
    for key, value in stated.items():
        if value is not None:
            values[key] = value
        elif values.get(key) and key not in _MAY_BE_NULL:
            raise FileError(file, f"{key} is null, which transformers 4 and 5 read differently")
    found = ProcessorSettings(file, kind, values, stated)
    for key in stated:
        inert = key in _INERT or (key == "auto_map" and kind == PHI3_V)
        if key not in _DEFAULTS[kind] and not inert and _means_something(key, stated[key]):
            raise found.refusal(key, f"a {kind} ignores it; remove it if the model was trained so")
    return found


def _means_something(key: str, value: Any) -> bool:
    usual = {"data_format": "channels_first", "default_to_square": False}
    # What would be cut out is stated where nothing is cut, too.
    return key != "crop_size" and bool(value) and value != usual.get(key)
