"""FastVLM: a tower of convolutions and attention, linear maps, a Qwen2, in Apple's layout and in
transformers'.

Facts from apple/ml-fastvlm at 592b4ad (llava/, predict.py), transformers 5.24 (models/fast_vlm and
what converted its checkpoints) and timm 1.0.31 (fastvit.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import decoders, llava_shape
from edgevlm.family import (
    Config,
    Family,
    FileError,
    Model,
    Source,
    decoder_spec,
    locating,
    section,
    setting,
    stop_tokens,
)
from edgevlm.image_specs import check_rows, image_spec
from edgevlm.parts.fastvit import HEAD, FastVit
from edgevlm.parts.llama import Llama
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.processors import (
    CLIP,
    PROCESSOR,
    ProcessorSettings,
    default_settings,
    find_settings,
)
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec
from edgevlm.templates import IMAGE, TEMPLATES, Cutter, Template, chat_template

_OWN = "llava_qwen2"
# The original's one tower, whose name ends in the pixels of a side (mobileclip_encoder.py).
_TOWER, _TIMM = re.compile(r"mobileclip_l_([1-9]\d{0,4})"), "fastvit_mci3"
_SIDE = 1024
_STAGES, _PATCH = 5, 64
# Beyond that a map of the first stage takes more memory than there is.
_SIDES, _KNOWN = range(_PATCH, 4096 + 1, _PATCH), f"only multiples of {_PATCH} up to 4096 are known"
_EPS = 1e-5
# Nobody sets a bound; the context does.
_MAX_PICTURES = 64
# What a config may say of no other value, of Apple's layout and of transformers'.
_OWN_ONLY: Mapping[str, Any] = {"mm_use_im_start_end": False, "mm_patch_merge_type": "flat"}
_ONLY: Mapping[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
# Keys of timm's arguments that change no computation but by the shapes of tensors, which are read.
_SIZES = ("inference_mode", "layers", "embed_dims", "mlp_ratios")


def _describe(source: Source) -> Model:
    config = source.files["config.json"]
    own = config["model_type"] == _OWN
    for key, known in (_OWN_ONLY if own else _ONLY).items():
        if (value := setting(config, key, known)) != known:
            raise ValueError(f"{key} is {value!r}; only {known!r} is known")
    stated = config if own else section(config, "text_config")
    text = _own_text(config) if own else _text(source, stated)
    if not own:
        _check_timm(section(config, "vision_config"))
    found = _own_settings(config) if own else _settings(source)
    side = _own_side(config) if own else _side(found)
    vision = _vision(source, side)
    projector = llava_shape.read_projector(config, vision, text, own)
    if not isinstance(projector, Mlp):
        raise ValueError(f"the projector is {projector.kind!r}; only linear maps are known")
    stops = stop_tokens(source.files, stated, decoders.EOS["qwen2"])
    cutter = Cutter(source.tokenizer, "none", stops[0])
    name = _template(source, own)
    template = _TEMPLATES[name]
    return Model(
        image=_image(source, config, found, vision, own),
        prompt=_prompt(template, name, cutter),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(
            stop_tokens=tuple(dict.fromkeys((cutter.end(template), *stops))), max_tokens=512
        ),
        vision=vision,
        projector=projector,
        text=text,
        markers=_markers(source, config, own),
        original=template.before + IMAGE + "\n{prompt}" + template.after,
    )


def _own_text(config: Config) -> Qwen2:
    text = decoders.read({**config, "model_type": "qwen2"}, "qwen2")
    assert isinstance(text, Qwen2)
    return text


def _text(source: Source, stated: Config) -> Llama:
    text = decoders.read(stated, "qwen2")
    if not isinstance(text, Qwen2):
        raise ValueError(f"the decoder is a {text.architecture!r}; only qwen2 is known")
    return decoders.with_tables(text, source, stated)


def _own_side(config: Config) -> int:
    name = config.get("mm_vision_tower")
    match = _TOWER.fullmatch(name) if isinstance(name, str) else None
    if not match:
        raise ValueError(
            f"mm_vision_tower is {name!r}; only FastVLM's is known, mobileclip_l_<pixels>"
        )
    if (side := int(match[1])) not in _SIDES:
        raise ValueError(f"mm_vision_tower is {name!r}; {_KNOWN}")
    return side


def _check_timm(stated: Config) -> None:
    """Raises ValueError for another tower than fastvit_mci3 as timm makes it."""
    arguments = section(stated, "model_args")
    for key, known in (("model_type", "timm_wrapper"), ("architecture", _TIMM)):
        if (value := stated.get(key, known)) != known:
            raise ValueError(f"vision_config.{key} is {value!r}; only {known!r} is known")
    if other := [key for key in arguments if key not in _SIZES]:
        raise ValueError(
            f"vision_config.model_args.{other[0]} is {arguments[other[0]]!r}; it is not known"
        )


# The first net of each block, and what tells attention, in Apple's layout and in timm's.
_BLOCK = re.compile(
    r"vision\.(?:network\.(\d+)|stages\.(\d+)\.blocks)\.(\d+)\.(?:(?:convffn|mlp)\.(fc1)"
    r"|token_mixer\.qkv)\.weight"
)


def _vision(source: Source, side: int) -> FastVit:
    """The tower of the weights, by their shapes."""
    stages: dict[int, dict[int, tuple[int, ...]]] = {}
    attending: set[int] = set()
    for raw, shape in source.shapes.items():
        if match := _BLOCK.fullmatch(_locate(raw) or ""):
            stage = int(match[1] or match[2])
            if match[4]:
                stages.setdefault(stage, {})[int(match[3])] = shape
            else:
                attending.add(stage)
    found = [stages[i] for i in sorted(stages)]
    if not found:
        raise ValueError("it holds no vision tower of FastVLM's")
    first = [blocks.get(0, ()) for blocks in found]
    whole = len(found) == _STAGES and all(len(shape) == 4 for shape in first)
    widths = [shape[1] for shape in first] if whole else []
    pairs = zip(widths, widths[1:], strict=False)
    last = sorted(stages)[_STAGES - len(attending) :]
    if not whole or any(b % a for a, b in pairs) or attending != {*last} or not attending:
        raise ValueError(f"the vision tower's stages are not those of {_TIMM}")
    if any(width % HEAD for width in widths[-len(attending) :]):
        raise ValueError(f"the vision tower's heads are not {HEAD} wide; only that is known")
    depths = tuple(max(blocks) + 1 for blocks in found)
    return FastVit(
        hidden_size=2 * widths[-1],
        intermediate_size=first[-1][0],
        num_hidden_layers=sum(depths),
        num_attention_heads=widths[-1] // HEAD,
        num_channels=3,
        image_size=side,
        patch_size=_PATCH,
        hidden_act="gelu",
        layer_norm_eps=_EPS,
        widths=tuple(widths),
        depths=depths,
        mlps=tuple(shape[0] for shape in first),
        attending=len(attending),
    )


def _own_settings(config: Config) -> ProcessorSettings:
    """The processor that the original makes itself, whatever lies beside the weights."""
    found, _ = default_settings(CLIP, _own_side(config))
    colours = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return replace(found, values={**found.values, **colours})


def _settings(source: Source) -> ProcessorSettings:
    found = find_settings(source.files, CLIP, (CLIP,))
    if found is None:
        raise FileError(PROCESSOR, "is not there; it says what becomes of a picture")
    return found


def _side(found: ProcessorSettings) -> int:
    """The side of the squares that a processor makes, which the tower takes whatever it is."""
    size = found.values["crop_size" if found.values["do_center_crop"] else "size"]
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, Mapping) else size
    if type(side) is not int:
        return _SIDE
    if side not in _SIDES:
        raise found.refusal("crop_size", _KNOWN)
    return side


def _image(
    source: Source, config: Config, found: ProcessorSettings, vision: FastVit, own: bool
) -> ImageSpec:
    side, tokens, ratio = vision.image_size, vision.rows, config.get("image_aspect_ratio")
    if own and ratio not in (None, "square", "pad"):
        raise ValueError(f"image_aspect_ratio {ratio!r} is not known; FastVLM has pad or square")
    if not own:
        check_rows(source.files, side, tokens)
    pad = source.fit == "pad" or (source.fit is None and own and ratio == "pad")
    image = image_spec(found, side, tokens, pad=pad, max_pictures=_MAX_PICTURES)
    if source.fit not in (None, image.fit):
        raise ValueError(f"the fit {source.fit!r} is not that of its processor, {image.fit!r}")
    return image


# conv_qwen_2 of llava/conversation.py, and the chat template that is converted with a checkpoint,
# which has a break before the words of every message.
_QWEN_2, _CHAT = "qwen_2", "fast_vlm"
_TEMPLATES: Mapping[str, Template] = {
    _QWEN_2: TEMPLATES["qwen_1_5"],
    _CHAT: replace(
        TEMPLATES["qwen_1_5"],
        answered="<|im_end|>\n<|im_start|>assistant\n\n",
        system=TEMPLATES["qwen_1_5"].system.replace("system\n", "system\n\n"),
    ),
}
# What the chat template writes, without blanks (convert_fastvlm_weights_to_hf.py).
_WRITTEN = [
    "'<|im_start|>system\\nYouareahelpfulassistant.<|im_end|>\\n'",
    "'<|im_start|>'+message['role']+'\\n'",
    "'<image>'",
    "'\\n'+content['text']",
    "'<|im_end|>'+'\\n'",
    "'<|im_start|>assistant\\n'",
]


def _template(source: Source, own: bool) -> str:
    """The user's choice, or the layout's; raises ValueError where the checkpoint states another."""
    known = ", ".join(_TEMPLATES)
    if source.template:
        if source.template not in _TEMPLATES:
            raise ValueError(f"the template {source.template!r} is not one of {known}")
        return source.template
    stated = None if own else chat_template(source.files)
    if stated:
        file, text = stated
        written = re.findall(r"\{\{(.*?)\}\}", text.replace("\n", "\\n"), re.DOTALL)
        if [re.sub(r"\s", "", each).replace('"', "'") for each in written] != _WRITTEN:
            raise FileError(
                file, f"its chat_template is not known; choose one of {known} (--template)"
            )
    return _QWEN_2 if own else _CHAT


def _prompt(template: Template, name: str, cutter: Cutter) -> PromptSpec:
    """The prompt of a conversation, all of whose texts are tokenized anew each time.

    Apple's words have a break behind every picture, those of the chat template one before them.
    """
    begin = ("{bos}",) if cutter.tokenizer.add_bos else ()
    apart = "" if name == _QWEN_2 else "\n"
    words = apart + "{prompt}" + template.after

    def cut(text: str) -> tuple[str, ...]:
        return cutter.cut(text, goes_on=True)

    return PromptSpec(
        tasks=llava_shape.TASKS,
        template=(*begin, *cut(template.before + IMAGE + words)),
        text_template=(*begin, *cut(template.before + words)),
        turn=cut(template.again + IMAGE + words),
        text_turn=cut(template.again + words),
        joined=True,
        picture=PictureLayout(whole=("{image}",) if apart else ("{image}", "\n")),
        answered=cut(template.answered)[-1] if template.answered else "",
        system_template=(*begin, *cut(template.system + IMAGE + words)),
        system_text_template=(*begin, *cut(template.system + words)),
    )


def _markers(source: Source, config: Config, own: bool) -> dict[int, str]:
    """Tokens of pictures, which no text may become."""
    if not own:
        return {
            setting(config, "image_token_index", setting(config, "image_token_id", 151646)): IMAGE
        }
    token = source.tokenizer.added.get(IMAGE)
    return {token.id: IMAGE} if token else {}


# Apple's layout, and transformers'.
_PARTS = (
    (
        re.compile(
            r"model\.vision_tower\.vision_tower\.model\.((?:patch_embed|network|conv_exp)\..+)"
        ),
        "vision.",
    ),
    (re.compile(r"model\.vision_tower\.timm_model\.((?:stem|stages|final_conv)\..+)"), "vision."),
    (re.compile(r"model\.mm_projector\.(\d+\..+)"), "projector."),
    (re.compile(r"model\.multi_modal_projector\.linear_1\.(.+)"), "projector.0."),
    (re.compile(r"model\.multi_modal_projector\.linear_2\.(.+)"), "projector.2."),
    (re.compile(r"(lm_head\.weight)"), "decoder."),
    (re.compile(r"model\.language_model\.(.+)"), "decoder."),
    (re.compile(r"model\.((?:layers|embed_tokens|norm)\..+)"), "decoder."),
)
# The pooling head, which nobody runs, counts of training and stored tables.
_UNUSED = re.compile(
    r"model\.vision_tower\.(?:vision_tower\.model|timm_model)\.head\..+"
    r"|.+\.num_batches_tracked|.+\.rotary_emb\.inv_freq"
)
_locate = locating(_PARTS, _UNUSED)


FAMILY = Family(
    name="fastvlm",
    license="apple-amlr",
    model_types=(_OWN, "fast_vlm"),
    describe=_describe,
    locate=_locate,
)
