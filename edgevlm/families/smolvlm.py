"""SmolVLM, SmolVLM2 and Idefics3: SigLIP on tiles, pixel shuffle, a LLaMA decoder.

SmolDocling and granite-docling have the same shape. Facts from transformers 4.57 (models/idefics3,
models/smolvlm) and huggingface/smollm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import decoders
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
from edgevlm.image_specs import image_spec
from edgevlm.parts.llama import Llama
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower
from edgevlm.processors import (
    IDEFICS3,
    PREPROCESSOR,
    SMOLVLM,
    ProcessorSettings,
    find_settings,
)
from edgevlm.specs import AnswerSpec, PictureLayout, PromptSpec, VideoSpec
from edgevlm.templates import SYSTEM, Cutter

# Defaults of Idefics3VisionConfig and SmolVLMVisionConfig, which config.json omits.
_VISION = SiglipTower(
    hidden_size=1152,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
_IMAGE, _FAKE, _END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
_GLOBAL = "<global-img>"
# Open a prompt; the second is LLaMA-3's, Idefics3's decoder.
_OPENINGS = ("<|im_start|>", "<|begin_of_text|>")
# Revisions of generation_config.json differ in it.
_STOPS = (_END, "<|im_end|>")
# transformers sets no bound; the context does.
_MAX_PICTURES = 64
# Left over from Idefics 2: what they would change is not in any Idefics3.
_OFF = ("use_resampler", "qk_layer_norms")


def _describe(source: Source) -> Model:
    if source.template or source.fit:
        raise ValueError("SmolVLM has one prompt template and one fit of pictures to choose from")
    config = source.files["config.json"]
    text = _text(source, config)
    vision = _vision(config)
    factor = setting(config, "scale_factor", 2)
    if factor < 1 or vision.grid % factor:
        raise ValueError(f"scale_factor {factor} does not divide the tower's grid {vision.grid}")
    projector = Shuffle(
        in_features=vision.hidden_size, out_features=text.hidden_size, factor=factor
    )
    found = find_settings(source.files, IDEFICS3, (IDEFICS3, SMOLVLM))
    if found is None:
        raise FileError(PREPROCESSOR, "is not there; it says how pictures are cut into tiles")
    image_token = setting(config, "image_token_id", 128257)
    ends = stop_tokens(source.files, section(config, "text_config"), decoders.EOS["llama"])
    added = source.tokenizer.added
    stops = dict.fromkeys((*(added[t].id for t in _STOPS if t in added), *ends))
    return Model(
        image=image_spec(
            found, vision.image_size, projector.tokens(vision.rows), max_pictures=_MAX_PICTURES
        ),
        prompt=replace(_prompt(source), video=_video(source, found)),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(stop_tokens=tuple(stops), max_tokens=512),
        vision=vision,
        projector=projector,
        text=text,
        markers={image_token: _IMAGE},
    )


def _text(source: Source, config: Config) -> Llama:
    stated = section(config, "text_config")
    for key in _OFF:
        if stated.get(key):
            raise ValueError(f"text_config.{key} is {stated[key]!r}; only false is known")
    text = decoders.read(stated, "llama")
    return decoders.with_tables(text, source, stated)


def _vision(config: Config) -> SiglipTower:
    vision = read_config(_VISION, section(config, "vision_config"), "vision_config.")
    if vision.num_channels != 3 or vision.image_size % vision.patch_size:
        raise ValueError(
            f"vision_config has {vision.num_channels} channels and {vision.image_size} pixels in "
            f"patches of {vision.patch_size}; only 3 and whole patches are known"
        )
    return vision


def _prompt(source: Source) -> PromptSpec:
    added = source.tokenizer.added
    lacking = [t for t in (_FAKE, _IMAGE, _END) if t not in added]
    opening = next((t for t in _OPENINGS if t in added), None)
    if lacking or opening is None:
        raise ValueError(f"the tokenizer lacks {(lacking or list(_OPENINGS))[0]}")
    cutter = Cutter(source.tokenizer, "none", added[_END].id)
    begin = ("{bos}",) if source.tokenizer.add_bos else ()
    after = "{prompt}" + f"{_END}\nAssistant:"

    system = f"{opening}System: {SYSTEM}{_END}\n"

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text, goes_on=True)

    return PromptSpec(
        template=(*begin, *cut(f"{opening}User:{_IMAGE}{after}")),
        text_template=(*begin, *cut(f"{opening}User: {after}")),
        turn=cut(f"{_END}\nUser:{_IMAGE}{after}"),
        text_turn=cut(f"{_END}\nUser: {after}"),
        tasks={
            "caption": "Can you describe this image?",
            "ocr": "What is the text in this image?",
        },
        picture=PictureLayout(
            whole=(_FAKE, _GLOBAL, "{image}", _FAKE),
            tile=(_FAKE, "<row_{row}_col_{column}>", "{image}"),
            line=("\n",),
            overview=("\n", _FAKE, _GLOBAL, "{image}", _FAKE),
            # The first 2.2B writes the places of tiles in letters.
            tokens={t: added[t].id for t in added if _PLACE.fullmatch(t)},
        ),
        reply=" ",
        system_template=(*begin, *cut(f"{system}User:{_IMAGE}{after}")),
        system_text_template=(*begin, *cut(f"{system}User: {after}")),
    )


# processing_smolvlm's texts around the frames of a video.
_OPENING = (
    "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
)
_FRAME, _CLOSING = "\nFrame from {time}:", "\n\n"
_SAMPLING = "video_sampling"
# Seconds at both ends of a long video, and the largest number that is written in words here.
_SKIP, _MOST_FRAMES = 1.0, 99


def _video(source: Source, found: ProcessorSettings) -> VideoSpec | None:
    """Frames as SmolVLM2's processor takes them; None for models before it."""
    stated = found.stated.get(_SAMPLING)
    if source.files["config.json"]["model_type"] != "smolvlm" or stated is None:
        return None
    values: Mapping[str, Any] = stated if isinstance(stated, Mapping) else {}
    fps, most, size = (values.get(key, 0) for key in ("fps", "max_frames", "video_size"))
    edge = size.get("longest_edge", 0) if isinstance(size, Mapping) else 0
    known = type(fps) in (int, float) and type(most) is int and type(edge) is int
    if not known or not (0 < fps < 1000 and 1 <= most <= _MOST_FRAMES and 1 <= edge <= 4096):
        raise FileError(
            found.file,
            f"{_SAMPLING} is {stated!r}; only fps, max_frames up to {_MOST_FRAMES} and "
            "video_size.longest_edge are known",
        )
    prompt = _prompt(source)

    def shown(template: tuple[str, ...]) -> tuple[str, ...]:
        """A template of words alone, with the frames before the user's."""
        place = next(i for i, item in enumerate(template) if "{prompt}" in item)
        before, after = template[place].split("{prompt}")
        return (*template[:place], before, "{image}", "{prompt}" + after, *template[place + 1 :])

    return VideoSpec(
        fps=float(fps),
        most=most,
        skip=_SKIP,
        longest_edge=edge,
        template=shown(prompt.text_template),
        system_template=shown(prompt.system_text_template),
        turn=shown(prompt.text_turn),
        opening=_OPENING,
        frame=_FRAME,
        closing=_CLOSING,
    )


_PLACE = re.compile(rf"{_FAKE}|{_GLOBAL}|<row_\d+_col_\d+>")
_PARTS = (
    (re.compile(r"model\.vision_model\.(.+)"), "vision."),
    (re.compile(r"model\.connector\.modality_projection\.(.+)"), "projector."),
    (re.compile(r"model\.text_model\.(.+)"), "decoder."),
    (re.compile(r"(lm_head\.weight)"), "decoder."),
)
_UNUSED = re.compile(r".+\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)")


FAMILY = Family(
    name="smolvlm",
    license="apache-2.0",
    model_types=("idefics3", "smolvlm"),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
)
