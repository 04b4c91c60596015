"""DeepSeek-VL 1.3B: SigLIP, two linear maps, a LLaMA decoder; in the original layout and in
transformers'.

Facts from deepseek-ai/DeepSeek-VL and transformers 4.57 (models/deepseek_vl).
"""

from __future__ import annotations

import re
from dataclasses import replace

from edgevlm import decoders, schema
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
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.siglip import SIGLIP_TOWER, SiglipTower
from edgevlm.processors import DEEPSEEK_VL, PREPROCESSOR, PROCESSOR, VLM, find_settings
from edgevlm.specs import AnswerSpec, ImageSpec, PictureLayout, PromptSpec
from edgevlm.templates import EOS, IMAGE, SEEING, SYSTEM, Cutter, Template

_OWN = "multi_modality"
_IMAGE, _END = "<image_placeholder>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
_TEMPLATE = Template(
    f"{SEEING}\n\nUser: ", "\n\nAssistant:", f"{EOS}User: ", system=f"{SYSTEM}\n\nUser: "
)
# transformers' chat template writes a system message as one more turn behind its own words.
_HF_SYSTEM = f"{SEEING}\n\nSystem: {SYSTEM}{EOS}User: "
# What the original's code has of the one tower that it is published with (siglip_vit.py,
# SigLIP_MODEL_CONFIG); the tensors say the rest.
_TOWER, _HEADS = "siglip_large_patch16_384", 16
_TOWER_ACT, _TOWER_EPS = "gelu", 1e-6
# The side where the original's config states none (clip_encoder.py).
_SIDE = 336
# What a config may say of no other value, with what its class takes where it says nothing.
_TOWER_ONLY = {
    "model_name": (_TOWER, _TOWER),
    "select_layer": (-1, -2),
    "ignore_head": (True, True),
    "ckpt_path": ("", ""),
}
_PROCESSOR_ONLY = {"add_special_token": False, "image_tag": _IMAGE, "sft_format": "deepseek"}
# Image embeddings of a picture where a processor's file does not say.
_TOKENS = 576
# Neither code sets a bound; the context does.
_MAX_PICTURES = 64


def _describe(source: Source) -> Model:
    if source.template or source.fit:
        raise ValueError("DeepSeek-VL has one prompt template and one fit of pictures")
    config = source.files["config.json"]
    own = config["model_type"] == _OWN
    vision = _own_vision(source, config) if own else _vision(config)
    text = _text(source, config, own)
    projector = _projector(config, vision, text, own)
    tokens = projector.tokens(vision.rows)
    _check_processor(source, tokens)
    added = source.tokenizer.added
    if lacking := [token for token in (_IMAGE, _END) if token not in added]:
        raise ValueError(f"the tokenizer lacks {lacking[0]}")
    image = setting(config, "image_token_id", 100015) if not own else added[_IMAGE].id
    if image != added[_IMAGE].id:
        raise ValueError(f"image_token_id is {image}, the tokenizer's is {added[_IMAGE].id}")
    end = added[_END].id
    # The original's configs have LLaMA's, which its code never reads.
    ends = () if own else stop_tokens(source.files, section(config, "text_config"), end)
    return Model(
        image=_image(source, config, vision, tokens, own),
        prompt=_prompt(source, end, own),
        decoder=decoder_spec(text, "causal"),
        answer=AnswerSpec(stop_tokens=tuple(dict.fromkeys((end, *ends))), max_tokens=512),
        vision=vision,
        projector=projector,
        text=text,
        markers={image: _IMAGE},
    )


def _own_vision(source: Source, config: Config) -> SiglipTower:
    if making := [key for key in config if key.startswith("gen_")]:
        raise ValueError(f"{making[0]} is a part of Janus; only DeepSeek-VL is known")
    stated = section(config, "vision_config")
    if (kind := stated.get("cls")) != "CLIPVisionTower":
        raise ValueError(
            f"vision_config.cls is {kind!r}; only CLIPVisionTower is known, the tower of the 1.3B"
        )
    params = section(stated, "params")
    for key, (known, default) in _TOWER_ONLY.items():
        if (value := setting(params, key, default)) != known:
            raise ValueError(f"vision_config.params.{key} is {value!r}; only {known!r} is known")
    shapes = {
        name.removeprefix("vision."): shape
        for raw, shape in source.shapes.items()
        if (name := _locate(raw) or "").startswith("vision.")
    }
    try:
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        mlp, _ = shapes["blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError("it holds no vision tower in timm's names") from None
    layers = [int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))]
    return _checked(
        SiglipTower(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=max(layers) + 1,
            num_attention_heads=_HEADS,
            num_channels=channels,
            image_size=setting(params, "image_size", _SIDE),
            patch_size=patch,
            hidden_act=_TOWER_ACT,
            layer_norm_eps=_TOWER_EPS,
        )
    )


def _vision(config: Config) -> SiglipTower:
    stated = section(config, "vision_config")
    kind = stated.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise ValueError(f"the vision tower is a {kind!r}; only siglip_vision_model is known")
    return _checked(read_config(SIGLIP_TOWER, stated, "vision_config."))


def _checked(vision: SiglipTower) -> SiglipTower:
    if vision.num_channels != 3 or vision.image_size % vision.patch_size:
        raise ValueError(
            f"the vision tower has {vision.num_channels} channels and {vision.image_size} pixels "
            f"in patches of {vision.patch_size}; only 3 and whole patches are known"
        )
    return vision


def _text(source: Source, config: Config, own: bool) -> Llama:
    stated = section(config, "language_config" if own else "text_config")
    if (kind := setting(stated, "model_type", "llama")) != "llama":
        raise ValueError(f"the decoder is a {kind!r}; only llama is known")
    text = decoders.read(stated, "llama")
    return decoders.with_tables(text, source, stated)


def _projector(config: Config, vision: SiglipTower, text: Llama, own: bool) -> Mlp:
    inside, outside = vision.hidden_size, text.hidden_size
    if not own:
        return Mlp(in_features=inside, out_features=outside, depth=2)
    stated = section(config, "aligner_config")
    params = section(stated, "params")
    for key, value, known in (
        ("cls", stated.get("cls"), "MlpProjector"),
        ("params.projector_type", params.get("projector_type"), "mlp_gelu"),
        ("params.input_dim", params.get("input_dim"), inside),
        ("params.n_embed", params.get("n_embed"), outside),
    ):
        if value != known:
            raise ValueError(f"aligner_config.{key} is {value!r}; only {known!r} is known")
    return Mlp(in_features=inside, out_features=outside, depth=setting(params, "depth", 1))


def _check_processor(source: Source, tokens: int) -> None:
    stated = source.files.get(PROCESSOR, {})
    for key, known in _PROCESSOR_ONLY.items():
        if stated.get(key, known) != known:
            raise FileError(PROCESSOR, f"{key} is {stated[key]!r}; only {known!r} is known")
    if (said := stated.get("num_image_tokens", _TOKENS)) != tokens:
        reason = f"num_image_tokens is {said!r}, config.json makes {tokens} image embeddings"
        raise FileError(PROCESSOR, reason)


def _image(
    source: Source, config: Config, vision: SiglipTower, tokens: int, own: bool
) -> ImageSpec:
    kind = VLM if own else DEEPSEEK_VL
    found = find_settings(source.files, kind, (kind,))
    if found is None:
        raise FileError(PREPROCESSOR, "is not there; it says how pictures are padded")
    image = image_spec(found, vision.image_size, tokens, max_pictures=_MAX_PICTURES)
    params = section(section(config, "vision_config"), "params") if own else {}
    mean, std = _three(params, "pixel_mean"), _three(params, "pixel_std")
    if not mean or not std:
        return image
    # The tower normalises, so the published file says that the processor does not.
    if found.values["do_normalize"]:
        raise found.refusal("do_normalize", "vision_config.params.pixel_mean normalises, too")
    if 0 in std:
        raise ValueError("vision_config.params.pixel_std: no channel's may be 0")
    return replace(image, mean=mean, std=std)


def _three(params: Config, key: str) -> tuple[float, float, float] | None:
    found: tuple[float, float, float] | None = schema.typed(
        tuple[float, float, float] | None, params.get(key), f"vision_config.params.{key}"
    )
    return found


def _prompt(source: Source, end: int, own: bool) -> PromptSpec:
    if not source.tokenizer.bytes:
        raise ValueError("the tokenizer has pieces; only one of bytes is known")
    cutter = Cutter(source.tokenizer, "none", end)
    begin = ("{bos}",) if source.tokenizer.add_bos else ()
    plain = "{prompt}" + _TEMPLATE.after
    asked = IMAGE + plain
    system = _TEMPLATE.system if own else _HF_SYSTEM
    return PromptSpec(
        template=(*begin, *cutter.cut(_TEMPLATE.before + asked)),
        text_template=(*begin, *cutter.cut(_TEMPLATE.before + plain)),
        turn=cutter.cut(_TEMPLATE.again + asked),
        text_turn=cutter.cut(_TEMPLATE.again + plain),
        tasks={"caption": "Describe the image.", "ocr": "What is the text in the image?"},
        picture=PictureLayout(whole=("{image}",)),
        reply=" ",
        strip=True,
        system_template=(*begin, *cutter.cut(system + asked)),
        system_text_template=(*begin, *cutter.cut(system + plain)),
    )


# The original's layout, transformers' 4 and 5.
_PARTS = (
    (
        re.compile(r"vision_model\.vision_tower\.((?:patch_embed|pos_embed|blocks|norm).*)"),
        "vision.",
    ),
    (
        re.compile(
            r"(?:model\.)?vision_model\.(?:vision_model\.)?"
            r"((?:embeddings|encoder|post_layernorm)\..+)"
        ),
        "vision.",
    ),
    (re.compile(r"aligner\.layers\.(\d+\..+)"), "projector."),
    (re.compile(r"(?:model\.)?aligner\.linear1\.(.+)"), "projector.0."),
    (re.compile(r"(?:model\.)?aligner\.linear2\.(.+)"), "projector.2."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), "decoder."),
    (re.compile(r"(?:language_model\.model|model\.language_model)\.(.+)"), "decoder."),
)
# SigLIP's pooling head, which neither code runs, and stored tables.
_UNUSED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..+"
    r"|(?:model\.)?vision_model\.(?:vision_model\.)?(?:head\..+|embeddings\.position_ids)"
    r"|.+\.rotary_emb\.inv_freq"
)
_locate = locating(_PARTS, _UNUSED)


FAMILY = Family(
    name="deepseek_vl",
    license="deepseek",
    model_types=(_OWN, "deepseek_vl"),
    describe=_describe,
    locate=_locate,
)
