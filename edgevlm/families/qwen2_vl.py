"""Qwen2-VL and Qwen2.5-VL: pictures in their own size and shape, a Qwen2 decoder with M-RoPE.

Facts from transformers 4.57 (models/qwen2_vl, models/qwen2_5_vl) and QwenLM's repositories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from edgevlm import decoders
from edgevlm.boxes import parse_qwen
from edgevlm.family import (
    Config,
    Family,
    FileError,
    Model,
    Source,
    decoder_spec,
    locating,
    read_config,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image.plan import limited
from edgevlm.image_specs import image_spec, native_spec
from edgevlm.parts.llama import Llama
from edgevlm.parts.patch_merger import PatchMerger
from edgevlm.parts.qwen2_vit import Qwen2Vit
from edgevlm.processors import (
    PREPROCESSOR,
    QWEN2_VL,
    ProcessorSettings,
    find_settings,
    video_settings,
)
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec, VideoSpec
from edgevlm.templates import SYSTEM, Cutter, chat_template

_OLD, _NEW = "qwen2_vl", "qwen2_5_vl"
# Defaults of Qwen2VLVisionConfig and Qwen2_5_VLVisionConfig.
_VISION = Qwen2Vit(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    num_channels=3,
    image_size=28,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-6,
    merge=2,
    frames=2,
    reach=1,
)
_NEW_VISION = replace(
    _VISION,
    hidden_size=3584,
    intermediate_size=3420,
    hidden_act="silu",
    gated=True,
    full_layers=(7, 15, 23, 31),
)
_WINDOW = 112
# Their names of the sizes that Qwen2Vit has.
_SIZES = {
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_channels": "num_channels",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "spatial_merge_size": "merge",
    "temporal_patch_size": "frames",
}
_OLD_SIZES = {**_SIZES, "embed_dim": "hidden_size"}
_NEW_SIZES = {
    **_SIZES,
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "fullatt_block_indexes": "full_layers",
}
_START, _PAD, _VIDEO, _END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
_TURN, _TURN_END = "<|im_start|>", "<|im_end|>"
_SYSTEM = "You are a helpful assistant."
_CHAT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>")
# transformers sets no bound; the context does.
_MAX_PICTURES = 64
# The models' cards propose 256 to 1280 squares of a picture; published files allow 16384.
_USUAL_SQUARES = 1280
# Qwen2VLVideoProcessor's defaults, and as many squares as it allows a frame where a file says
# nothing; published files allow 16384. The bound on all pairs is that of qwen_vl_utils, which is
# published with the models, in its first versions.
_FPS, _LEAST_FRAMES, _MOST_FRAMES = 2.0, 4, 768
_USUAL_FRAME_SQUARES, _LEAST_FRAME_SQUARES, _VIDEO_SQUARES = 768, 128, 24576
# Nothing bounds the shape of what a picture is rounded to but this, half as much again as its own.
_LONGEST_SHAPE = 300
_TASKS: Mapping[str, str] = {
    "caption": "Describe this image.",
    "ocr": "Read all the text in the image.",
}
# After the notebooks published with Qwen2.5-VL (cookbooks/spatial_understanding, ocr), from memory:
# they could not be had.
_NEW_TASKS: Mapping[str, str] = {
    "caption": "Describe this image.",
    "ocr": "Please output only the text content from the image without any additional "
    "descriptions or formatting.",
    "detect": "Locate {prompt}, output all the bbox coordinates in JSON format.",
    "ground": "Outline the position of each object and output all the coordinates in JSON format.",
}


def _describe(source: Source) -> Model:
    if source.template or source.fit:
        raise ValueError("Qwen2-VL has one prompt template and one fit of pictures to choose from")
    config = source.files["config.json"]
    new = config["model_type"] == _NEW
    text, stated = _text(source, config)
    vision = _vision(config, text, new)
    found = _settings(source, vision)
    image, notes = _image(found, vision)
    # Any bound up to the checkpoint's own may be chosen later.
    assert image.native
    reach = math.isqrt(_LONGEST_SHAPE * image.native.most) // vision.patch_size + 2 * vision.merge
    ids = _token_ids(source, config)
    ends = (ids[_TURN_END], *stop_tokens(source.files, stated, ids[_TURN_END]))
    prompt = _prompt(source, ids, _NEW_TASKS if new else _TASKS)
    if _VIDEO in ids:
        prompt = replace(prompt, video=_video(source, found, prompt, vision, new))
    return Model(
        image=image,
        prompt=prompt,
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(stop_tokens=tuple(dict.fromkeys(ends)), max_tokens=512),
        vision=replace(vision, reach=reach),
        projector=PatchMerger(
            in_features=vision.hidden_size,
            out_features=text.hidden_size,
            factor=vision.merge,
            gated=vision.gated,
        ),
        text=text,
        markers={ids[name]: name for name in (_PAD, _VIDEO) if name in ids},
        notes=notes,
    )


def _text(source: Source, config: Config) -> tuple[Llama, Config]:
    """The decoder and its config, which published files have at their top level."""
    stated = section(config, "text_config") or config
    text = decoders.read(stated, str(config["model_type"]))
    if text.architecture != "qwen2vl":
        raise ValueError(f"the decoder is a {text.architecture!r}; only qwen2_vl's is known")
    return decoders.with_tables(text, source, stated), stated


def _vision(config: Config, text: Llama, new: bool) -> Qwen2Vit:
    stated = section(config, "vision_config")
    names = _NEW_SIZES if new else _OLD_SIZES
    known = {ours: stated[name] for name, ours in names.items() if name in stated}
    vision = read_config(_NEW_VISION if new else _VISION, known, "vision_config.")
    out = setting(stated, "out_hidden_size" if new else "hidden_size", 3584)
    if out != text.hidden_size:
        raise ValueError(
            f"the vision tower makes rows of {out}, the decoder's are {text.hidden_size}"
        )
    if vision.frames != 2:
        raise ValueError(f"vision_config.temporal_patch_size is {vision.frames}; only 2 is known")
    if vision.num_channels != 3 or stated.get("in_chans", 3) != 3:
        raise ValueError(f"vision_config.in_channels is {vision.num_channels}; only 3 is known")
    if vision.hidden_size % (4 * vision.num_attention_heads):
        raise ValueError(
            f"vision_config.num_heads is {vision.num_attention_heads}; heads as wide as a multiple "
            f"of 4 that divide {vision.hidden_size} are known"
        )
    vision = replace(vision, image_size=vision.patch_size * vision.merge)
    if new:
        return replace(vision, window=_window(stated, vision))
    ratio = stated.get("mlp_ratio", 4)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or ratio <= 0:
        raise ValueError(f"vision_config.mlp_ratio is {ratio!r}; only a number above 0 is known")
    return replace(vision, intermediate_size=int(vision.hidden_size * ratio))


def _window(stated: Config, vision: Qwen2Vit) -> int:
    """The side of a window in squares of merged patches."""
    pixels = setting(stated, "window_size", _WINDOW)
    side = pixels // vision.merge // vision.patch_size
    if side < 1:
        raise ValueError(
            f"vision_config.window_size is {pixels}; windows have {vision.image_size} pixels "
            "and more"
        )
    return side


def _settings(source: Source, vision: Qwen2Vit) -> ProcessorSettings:
    found = find_settings(source.files, QWEN2_VL, (QWEN2_VL,))
    if found is None:
        raise FileError(PREPROCESSOR, "is not there; it says how large pictures may be")
    for key, known in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.merge),
        ("temporal_patch_size", vision.frames),
    ):
        if found.values[key] != known:
            raise found.refusal(key, f"the vision tower's is {known}")
    return found


def _image(found: ProcessorSettings, vision: Qwen2Vit) -> tuple[ImageSpec, tuple[str, ...]]:
    image = image_spec(found, vision.image_size, 1, max_pictures=_MAX_PICTURES)
    usual = _USUAL_SQUARES * vision.image_size**2
    if image.native is None or image.native.most <= usual:
        return image, ()
    note = (
        f"pictures have {usual} pixels at most unless told otherwise (max_pixels); the checkpoint "
        f"allows {image.native.most}"
    )
    return limited(image, max_pixels=usual), (note,)


def _token_ids(source: Source, config: Config) -> dict[str, int]:
    """Ids of the tokens that a prompt is made of, by text."""
    added = source.tokenizer.added
    ids = {name: added[name].id for name in (*_NEEDED, _VIDEO) if name in added}
    if lacking := [name for name in _NEEDED if name not in ids]:
        raise ValueError(f"the tokenizer lacks {lacking[0]}")
    for key, name in (("image_token_id", _PAD), ("vision_start_token_id", _START)):
        # transformers places pictures by them.
        if (stated := setting(config, key, _DEFAULT_IDS[name])) != ids[name]:
            raise ValueError(f"{key} is {stated}, but {name} is {ids[name]} in the tokenizer")
    return ids


_NEEDED = (_START, _PAD, _END, _TURN, _TURN_END)
_DEFAULT_IDS = {_PAD: 151655, _START: 151652}


def _prompt(source: Source, ids: Mapping[str, int], tasks: Mapping[str, str]) -> PromptSpec:
    cutter = Cutter(source.tokenizer, "none", ids[_TURN_END])
    end = f"{_TURN_END}\n"
    words, turned = _system(source), f"{_TURN}system\n{{}}{end}"
    system = turned.format(words) if words else ""
    turn = f"{_TURN}user\n<image>{{prompt}}{end}{_TURN}assistant\n"
    begin = ("{bos}",) if source.tokenizer.add_bos else ()
    return PromptSpec(
        template=(*begin, *cutter.cut(f"{system}{turn}", goes_on=True)),
        system_template=(*begin, *cutter.cut(turned.format(SYSTEM) + turn, goes_on=True)),
        turn=cutter.cut(f"{end}{turn}", goes_on=True),
        tasks=tasks,
        joined=True,
        picture=PictureLayout(
            whole=(_START, "{image}", _END), tokens={name: ids[name] for name in (_START, _END)}
        ),
    )


def _video(
    source: Source,
    pictures: ProcessorSettings,
    prompt: PromptSpec,
    vision: Qwen2Vit,
    new: bool,
) -> VideoSpec:
    """Videos as the files say, and Qwen2VLVideoProcessor where they say nothing."""
    square = vision.image_size**2
    edges = {
        "shortest_edge": _LEAST_FRAME_SQUARES * square,
        "longest_edge": _USUAL_FRAME_SQUARES * square,
    }
    bounds = {"size": edges, "min_pixels": None, "max_pixels": None}
    usual = {"fps": _FPS, "min_frames": _LEAST_FRAMES, "max_frames": _MOST_FRAMES}
    found = video_settings(source.files, pictures, bounds | usual)
    fps, least, most = (found.values[key] for key in usual)
    if type(fps) not in (int, float) or not 0 < fps < 1000:
        raise found.refusal("fps", "only a number above 0 is known")
    if type(least) is not int or type(most) is not int or not 1 <= least <= most <= 4096:
        raise found.refusal("max_frames", f"with min_frames {least!r} only 1 to 4096 are known")
    rate = setting(section(source.files["config.json"], "vision_config"), "tokens_per_second", 4)
    if new and not 1 <= rate <= 4096:
        raise ValueError(f"vision_config.tokens_per_second is {rate}; only 1 and more are known")
    native = native_spec(found)
    return VideoSpec(
        fps=float(fps),
        most=most,
        template=prompt.template,
        system_template=prompt.system_template,
        turn=prompt.turn,
        opening=_START,
        closing=_END,
        pairs=True,
        least=least,
        native=replace(native, max_pixels=min(native.most, _USUAL_FRAME_SQUARES * square)),
        total=_VIDEO_SQUARES * square,
        per_second=rate if new else 0,
    )


def _system(source: Source) -> str:
    """The system's words that transformers' chat template writes of its own, "" for none."""
    stated = chat_template(source.files, "tokenizer_config.json")
    if stated is None:
        return _SYSTEM
    name, text = stated
    if _TURN not in text:
        raise FileError(name, f"its chat_template lacks {_TURN}; only ChatML is known")
    found = _CHAT_SYSTEM.search(text)
    return found[1].replace("\\n", "\n") if found else ""


_PARTS = (
    # transformers before 4.52, and from there on.
    (re.compile(r"(?:model\.)?visual\.merger\.(.+)"), "projector."),
    (re.compile(r"(?:model\.)?visual\.(.+)"), "vision."),
    (re.compile(r"model\.language_model\.(.+)"), "decoder."),
    (re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)"), "decoder."),
    (re.compile(r"(lm_head\.weight)"), "decoder."),
)
_UNUSED = re.compile(r".+\.(?:rotary_emb|rotary_pos_emb)\.inv_freq")


FAMILY = Family(
    name="qwen2_vl",
    license="apache-2.0",
    model_types=(_OLD, _NEW),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
    boxes=parse_qwen,
)
