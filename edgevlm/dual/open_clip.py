"""CLIP and SigLIP in open_clip's layout: open_clip_config.json beside the weights.

Facts from mlfoundations/open_clip 3.3 and timm 1.0. Pictures are cut out of their middle as
transformers does, at most a pixel beside where torchvision does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgevlm.dual import OPEN_CLIP, DualFamily, DualModel
from edgevlm.dual.clip import TEMPLATE
from edgevlm.dual.siglip import TEMPLATE as SIGLIP_TEMPLATE
from edgevlm.dual.siglip import map_head
from edgevlm.family import (
    Config,
    FileError,
    Source,
    locating,
    section,
    setting,
)
from edgevlm.parts.class_row import ClassRow
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.picture_encoder import PictureEncoder
from edgevlm.parts.siglip import SiglipTower
from edgevlm.parts.text_tower import Pooled, TextTower
from edgevlm.processors import CLIP_MEAN, CLIP_STD
from edgevlm.specs import Clean, ImageSpec, Resample, TextSpec

_EPS, _TIMM_EPS = 1e-5, 1e-6
# What else a config may say, with the one value that changes nothing here; of keys that are not
# listed nothing is known.
_MODEL_KEYS = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
)
_VISION_ONLY: Mapping[str, Any] = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "timm_model_name": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_TEXT_ONLY: Mapping[str, Any] = {
    **{key: _VISION_ONLY[key] for key in ("ls_init_value", "final_ln_after_pool", "block_type")},
    **{key: False for key in _VISION_ONLY if key.startswith(("qk_", "scale"))},
    "embed_cls": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "tokenizer_mode": None,
    "use_pad_mask": False,
}
# Keys of training, and of what is not built where the keys above have their values.
_INERT = re.compile(
    r"patch_dropout|output_tokens|output_dict|attn_pooler_\w+|timm_\w+|hf_\w+|pad_id"
)
_POOLED: Mapping[str, Pooled] = {"argmax": "largest", "eos": "end", "last": "last"}
_CLEANS: Mapping[str, Clean] = {"canonicalize": "canonicalize", "lower": "lower", "whitespace": ""}
# timm's names of SigLIP's towers: heads, and those whose activation is the tanh of GELU.
_TIMM = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(?:gap_)?\d+.*")
_BLOCK = re.compile(r"visual\.trunk\.blocks\.(\d+)\.")
_TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
_TIMM_TANH = (("base", "32"), ("so400m", "16"), ("giantopt", "16"))
_RESAMPLE: Mapping[str, Resample] = {"bicubic": "bicubic", "bilinear": "bilinear"}


def _describe(source: Source) -> DualModel:
    try:
        return _read(source)
    except FileError:
        raise
    except ValueError as e:
        raise FileError(OPEN_CLIP, str(e)) from None


def _read(source: Source) -> DualModel:
    whole = source.files[OPEN_CLIP]
    config = section(whole, "model_cfg")
    width = setting(config, "embed_dim", 0)
    _check(config, {}, _MODEL_KEYS, "model_cfg.")
    quick = setting(config, "quick_gelu", False)
    vision_cfg, text_cfg = section(config, "vision_cfg"), section(config, "text_cfg")
    timm = vision_cfg.get("timm_model_name") is not None
    vision = _timm(source, vision_cfg) if timm else _vision(source, vision_cfg, width, quick)
    if width != vision.width:
        raise ValueError(f"model_cfg.embed_dim is {width}, a picture's row has {vision.width}")
    tower = _text(source, text_cfg, width, quick)
    sigmoid = "logit_bias" in source.shapes
    return DualModel(
        image=_image(section(whole, "preprocess_cfg"), vision.tower.image_size),
        text=TextSpec(
            tokens=tower.tokens,
            width=width,
            scale=1.0,
            sigmoid=sigmoid,
            clean=_clean(text_cfg),
            template=SIGLIP_TEMPLATE if sigmoid else TEMPLATE,
        ),
        vision=vision,
        tower=tower,
    )


def _check(config: Config, only: Mapping[str, Any], read: tuple[str, ...], where: str) -> None:
    """Refuses a setting that nobody here knows, and one of `only` that has another value."""
    for key, value in config.items():
        if key in read or value is None:
            continue
        if key in only:
            if value != only[key]:
                raise ValueError(f"{where}{key} is {value!r}; only {only[key]!r} is known")
        elif not _INERT.fullmatch(key):
            raise ValueError(f"{where}{key} is {value!r}; it is not known")


def _vision(source: Source, config: Config, width: int, quick: bool) -> PictureEncoder:
    read = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size")
    _check(config, _VISION_ONLY, (*read, "act_kwargs", "norm_kwargs"), "vision_cfg.")
    layers = config.get("layers", 12)
    if not isinstance(layers, int):
        raise ValueError(f"vision_cfg.layers is {layers!r}; only vision transformers are known")
    hidden = setting(config, "width", 768)
    tower = ClipTower(
        hidden_size=hidden,
        intermediate_size=int(hidden * setting(config, "mlp_ratio", 4.0)),
        num_hidden_layers=layers,
        num_attention_heads=hidden // setting(config, "head_width", 64),
        num_channels=3,
        image_size=_side(config.get("image_size", 224), "vision_cfg.image_size"),
        patch_size=_side(config.get("patch_size", 16), "vision_cfg.patch_size"),
        hidden_act=_act(config, quick),
        layer_norm_eps=_eps(config),
        class_token=True,
    )
    head = ClassRow(hidden_size=hidden, layer_norm_eps=tower.layer_norm_eps, projection_dim=width)
    return PictureEncoder(tower=tower, head=head)


def _timm(source: Source, config: Config) -> PictureEncoder:
    """SigLIP's tower as timm names it; its sizes are the tensors'."""
    name = setting(config, "timm_model_name", "")
    match = _TIMM.fullmatch(name)
    pool, proj = config.get("timm_pool"), config.get("timm_proj")
    if not match or pool != "map" or proj not in ("none", ""):
        raise ValueError(
            f"vision_cfg.timm_model_name is {name!r} with timm_pool {pool!r} and timm_proj "
            f"{proj!r}; of timm's towers only SigLIP's are known (map, none)"
        )
    try:
        width, channels, patch, _ = source.shapes["visual.trunk.patch_embed.proj.weight"]
        mlp, _ = source.shapes["visual.trunk.blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError("the weights hold no tower of timm's (visual.trunk)") from None
    layers = [
        int(m[1]) for n in source.shapes if (m := re.match(r"visual\.trunk\.blocks\.(\d+)\.", n))
    ]
    tower = SiglipTower(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=_TIMM_HEADS[match[1]],
        num_channels=channels,
        image_size=_side(config.get("image_size", 224), "vision_cfg.image_size"),
        patch_size=patch,
        hidden_act="gelu_pytorch_tanh" if match.groups() in _TIMM_TANH else "gelu",
        layer_norm_eps=_TIMM_EPS,
    )
    return PictureEncoder(tower=tower, head=map_head(tower))


def _text(source: Source, config: Config, width: int, quick: bool) -> TextTower:
    read = ("width", "heads", "layers", "mlp_ratio", "context_length", "vocab_size", "eos_id")
    more = ("no_causal_mask", "pool_type", "proj_bias", "act_kwargs", "norm_kwargs")
    _check(config, _TEXT_ONLY, (*read, *more, "tokenizer_kwargs"), "text_cfg.")
    pool = setting(config, "pool_type", "argmax")
    if pool not in _POOLED:
        raise ValueError(f"text_cfg.pool_type is {pool!r}; only {', '.join(_POOLED)} are known")
    hidden = setting(config, "width", 512)
    tokens = setting(config, "context_length", 77)
    return TextTower(
        hidden_size=hidden,
        intermediate_size=int(hidden * setting(config, "mlp_ratio", 4.0)),
        num_hidden_layers=setting(config, "layers", 12),
        num_attention_heads=setting(config, "heads", 8),
        max_position_embeddings=tokens,
        vocab_size=setting(config, "vocab_size", 49408),
        hidden_act=_act(config, quick),
        layer_norm_eps=_eps(config),
        projection_dim=width,
        projection_bias=setting(config, "proj_bias", False),
        causal=not setting(config, "no_causal_mask", False),
        end_id=setting(config, "eos_id", 2),
        tokens=tokens,
        pooled=_POOLED[pool],
    )


def _act(config: Config, quick: bool) -> str:
    approximate = section(config, "act_kwargs").get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"act_kwargs.approximate is {approximate!r}; only tanh is known")
    return "quick_gelu" if quick else "gelu_pytorch_tanh" if approximate == "tanh" else "gelu"


def _eps(config: Config) -> float:
    return setting(section(config, "norm_kwargs"), "eps", _EPS)


def _clean(config: Config) -> Clean:
    """The cleaning of a text beside its tokenizer's; CLIP's own does all that it needs."""
    if config.get("hf_tokenizer_name") is None:
        return ""
    said = section(config, "tokenizer_kwargs").get("clean", "whitespace")
    if said not in _CLEANS:
        raise ValueError(f"text_cfg.tokenizer_kwargs.clean is {said!r}; it is not known")
    return _CLEANS[said]


def _image(config: Config, side: int) -> ImageSpec:
    """The picture's spec by preprocess_cfg, or as open_clip has it where that is silent."""
    mode, filter_ = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"preprocess_cfg.resize_mode is {mode!r}; only shortest or squash is known"
        )
    if filter_ not in _RESAMPLE:
        raise ValueError(
            f"preprocess_cfg.interpolation is {filter_!r}; only {', '.join(_RESAMPLE)} are known"
        )
    if (found := _side(config.get("size", side), "preprocess_cfg.size")) != side:
        raise ValueError(f"preprocess_cfg.size is {found}; the vision tower takes {side} pixels")
    return ImageSpec(
        size=side,
        tokens=1,
        mean=_channels(config, "mean", CLIP_MEAN),
        std=_channels(config, "std", CLIP_STD),
        resample=_RESAMPLE[filter_],
        fit="crop" if mode == "shortest" else "stretch",
    )


def _channels(
    config: Config, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    found = config.get(key)
    if found is None:
        return default
    numbers = isinstance(found, list) and all(isinstance(x, (int, float)) for x in found)
    if not numbers or len(found) != 3:
        raise ValueError(f"preprocess_cfg.{key} is {found!r}; only three numbers are known")
    return float(found[0]), float(found[1]), float(found[2])


def _side(value: Any, key: str) -> int:
    """A side in pixels: an integer, or the same one twice or behind the number of channels."""
    sides = list(value[-2:]) if isinstance(value, (list, tuple)) and value else [value]
    if not all(type(s) is int and s == sides[0] and s > 0 for s in sides):
        raise ValueError(f"{key} is {value!r}; only a square is known")
    return int(sides[0])


_PARTS = (
    (re.compile(r"(?:module\.)?visual\.(?:trunk\.)?(.+)"), "vision."),
    (re.compile(r"(?:module\.)?text\.(.+)"), "text."),
    (re.compile(r"(?:module\.)?(logit_(?:scale|bias))"), "score."),
    (
        re.compile(
            r"(?:module\.)?((?:token_embedding|transformer|ln_final)\..+|positional_embedding"
            r"|text_projection(?:\..+)?)"
        ),
        "text.",
    ),
)
# The causal mask, and what OpenAI's archives say beside their tensors.
_UNUSED = re.compile(
    r"(?:module\.)?(?:(?:text\.)?attn_mask|input_resolution|context_length|vocab_size)"
)


FAMILY = DualFamily(
    name="open_clip",
    license="unknown; see the model's page",
    model_types=(),
    describe=_describe,
    locate=locating(_PARTS, _UNUSED),
)
