"""Moondream2: SigLIP over tiles that overlap, one map of them beside the whole picture, a Phi.

Of its dated revisions 2025-06-21 is read, whose sizes, templates and token ids stand in its code
(vikhyat/moondream at 44146f1, moondream/torch) and not in its config.json; that may state others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.family import (
    Config,
    Family,
    FileError,
    Model,
    Source,
    decoder_spec,
    read_config,
    section,
)
from edgevlm.parts.phi2 import Phi2
from edgevlm.parts.regions import Regions
from edgevlm.parts.siglip import SiglipTower
from edgevlm.parts.views_mlp import ViewsMlp
from edgevlm.spec_bounds import overlap_problem
from edgevlm.specs import AnswerSpec, ImageSpec, PromptSpec, RegionSpec, TileSpec

_REVISION = "vikhyatk/moondream2@2025-06-21"
_CODE, _FAST, _STARMIE = "moondream.py", "tokenizer.json", "moondream/starmie-v1"
_TOKENIZER = "tokenizer"
_BEGIN, _MARK = "<|endoftext|>", "<|md_reserved_0|>"
_HALF = (0.5, 0.5, 0.5)
# Nothing states them: torch's default, and rope.py's.
_EPS, _THETA = 1e-5, 10000.0


@dataclass(frozen=True)
class _Text:
    """TextConfig of config.py; prefix_attn is read by no code."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32
    prefix_attn: int = 730


@dataclass(frozen=True)
class _Vision:
    """VisionConfig of config.py."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4
    proj_inner_dim: int = 8192


@dataclass(frozen=True)
class _Region:
    """RegionConfig of config.py."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192


# TokenizerConfig of config.py, as far as it is read.
_IDS: Mapping[str, int] = {"bos_id": 0, "eos_id": 0, "answer_id": 3}
_UNREAD_IDS = ("thinking_id", "coord_id", "size_id", "start_ground_points_id", "end_ground_id")
_TEMPLATES: Mapping[str, Mapping[str, list[int]]] = {
    "caption": {
        "normal": [1, 32708, 2, 6382, 3],
        "short": [1, 32708, 2, 12492, 3],
        "long": [1, 32708, 2, 4059, 3],
    },
    "query": {"prefix": [1, 15381, 2], "suffix": [3]},
    "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
    "point": {"prefix": [1, 2581, 2], "suffix": [3]},
}
_SECTIONS = ("text", "vision", "region", "tokenizer")


def _describe(source: Source) -> Model:
    if source.fit or source.template:
        raise ValueError("Moondream2 has one fit of pictures and one template to choose from")
    _check_revision(source)
    config = section(source.files["config.json"], "config")
    _check_keys(config, _SECTIONS, "config.")
    text, vision = _text(config), _vision(config)
    projector = ViewsMlp(
        in_features=2 * vision.hidden_size,
        hidden_features=_read(_Vision(), config, "vision").proj_inner_dim,
        out_features=text.hidden_size,
    )
    regions = _regions(config, text.hidden_size)
    ids, templates = _tokens(source, section(config, "tokenizer"), text.vocab_size)
    return Model(
        image=_image(config, vision),
        prompt=_prompt(templates),
        decoder=decoder_spec(text, "opening"),
        answer=AnswerSpec(
            stop_tokens=(ids["eos_id"],),
            max_tokens=768,
            strip=True,
            never=(ids["answer_id"],),
        ),
        vision=vision,
        projector=projector,
        text=text,
        own_tokenizer=True,
        region_model=regions,
        regions=RegionSpec(
            {"detect": "boxes", "point": "points"},
            regions.coord_bins,
            regions.size_bins,
            ids["eos_id"],
        ),
    )


def _check_revision(source: Source) -> None:
    """Raises ValueError for weights or code of another revision."""
    old = ("text_model.", "vision_encoder.", "region_model.")
    for name in source.shapes:
        if name.startswith(old):
            raise ValueError(
                f"the weights ({name}) are of a revision before 2025; name {_REVISION}"
            )
        if name.endswith(".packed"):
            raise ValueError(f"the weights ({name}) are packed into 4 bits; name {_REVISION}")
    code = source.files.get(_CODE)
    if code is not None and code.get(_TOKENIZER) != _STARMIE:
        raise FileError(
            _CODE, f"is of another revision, whose tokenizer is not {_STARMIE}; name {_REVISION}"
        )


def _tokenizer(source: Source) -> str | None:
    """The repository of the tokenizer: the one in the checkpoint's is of older revisions."""
    if named := source.settings.get(_TOKENIZER):
        return named
    if _MARK in _texts(source.files.get(_FAST, {})):
        return None
    return _STARMIE if source.files.get(_CODE, {}).get(_TOKENIZER) == _STARMIE else None


def _texts(tokenizer: Config) -> set[Any]:
    return {token.get("content") for token in tokenizer.get("added_tokens", ())}


def _check_keys(config: Config, known: Iterable[str], where: str) -> None:
    if unknown := sorted({*config} - {*known}):
        raise ValueError(f"{where}{unknown[0]} is not known; only {', '.join(known)} are")


def _read(defaults: Any, config: Config, name: str) -> Any:
    """A section of the config; raises ValueError for a key that its class has not."""
    stated = section(config, name)
    if stated.get("group_size") is not None:
        raise ValueError(f"config.{name}.group_size: weights in 4 bits; name {_REVISION}")
    _check_keys(stated, [*vars(defaults), "group_size"], f"config.{name}.")
    return read_config(defaults, stated, f"config.{name}.")


def _text(config: Config) -> Phi2:
    text = _read(_Text(), config, "text")
    if text.n_kv_heads != text.n_heads:
        raise ValueError(
            f"config.text.n_kv_heads is {text.n_kv_heads}; only n_heads, {text.n_heads}, is known"
        )
    # Half of each head turns, in pairs.
    if text.dim % (4 * text.n_heads):
        raise ValueError(f"config.text.dim is {text.dim}, not {text.n_heads} heads of 4 n each")
    return Phi2(
        hidden_size=text.dim,
        intermediate_size=text.ff_dim,
        num_hidden_layers=text.n_layers,
        num_attention_heads=text.n_heads,
        num_key_value_heads=text.n_heads,
        head_dim=text.dim // text.n_heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_context,
        layer_norm_eps=_EPS,
        rms_norm_eps=_EPS,
        rope_theta=_THETA,
        rotary_dim=text.dim // text.n_heads // 2,
        extra_norms=False,
        lora_alpha=0.0,
    )


def _vision(config: Config) -> SiglipTower:
    vision, text = _read(_Vision(), config, "vision"), _read(_Text(), config, "text")
    if vision.in_channels != 3 or vision.crop_size % vision.enc_patch_size:
        raise ValueError(
            f"config.vision has {vision.in_channels} channels and crops of {vision.crop_size} "
            f"pixels in patches of {vision.enc_patch_size}; only 3 and whole patches are known"
        )
    if vision.enc_dim % vision.enc_n_heads:
        raise ValueError(
            f"config.vision.enc_dim is {vision.enc_dim}, not {vision.enc_n_heads} heads"
        )
    if vision.proj_out_dim != text.dim:
        raise ValueError(
            f"config.vision.proj_out_dim is {vision.proj_out_dim}, config.text.dim {text.dim}"
        )
    return SiglipTower(
        hidden_size=vision.enc_dim,
        intermediate_size=vision.enc_ff_dim,
        num_hidden_layers=vision.enc_n_layers,
        num_attention_heads=vision.enc_n_heads,
        num_channels=vision.in_channels,
        image_size=vision.crop_size,
        patch_size=vision.enc_patch_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=_EPS,
    )


def _regions(config: Config, n_embd: int) -> Regions:
    region = _read(_Region(), config, "region")
    if region.dim != n_embd:
        raise ValueError(f"config.region.dim is {region.dim}, config.text.dim {n_embd}")
    for key in ("coord_feat_dim", "size_feat_dim", "size_out_dim"):
        if (found := getattr(region, key)) % 2 or found < 4:
            raise ValueError(f"config.region.{key} is {found}, not an even number from 4 on")
    return Regions(
        hidden_size=region.dim,
        inner_size=region.inner_dim,
        coord_features=region.coord_feat_dim,
        coord_bins=region.coord_out_dim,
        size_features=region.size_feat_dim,
        size_bins=region.size_out_dim // 2,
    )


def _image(config: Config, tower: SiglipTower) -> ImageSpec:
    vision = _read(_Vision(), config, "vision")
    tiles = TileSpec(
        "overlap",
        overview="first",
        overview_of="picture",
        most=vision.max_crops,
        margin=vision.overlap_margin,
    )
    image = ImageSpec(
        tower.image_size,
        tower.rows,
        _HALF,
        _HALF,
        resample="lanczos",
        tiles=tiles,
        exact="bfloat16",
    )
    if problem := overlap_problem(image, tiles):
        raise ValueError(f"config.vision.overlap_margin is {tiles.margin}: {problem}")
    return image


def _tokens(
    source: Source, config: Config, n_vocab: int
) -> tuple[dict[str, int], Mapping[str, Mapping[str, list[int]]]]:
    """Ids by their names in the config, and templates; raises ValueError for those that are not the
    tokenizer's.
    """
    _check_keys(config, (*_IDS, *_UNREAD_IDS, "templates"), "config.tokenizer.")
    ids = {key: config.get(key, known) for key, known in _IDS.items()}
    added = source.tokenizer.added
    file = _FAST if source.settings.get(_TOKENIZER) is None else f"{_TOKENIZER}/{_FAST}"
    if _MARK not in added or _BEGIN not in added:
        raise FileError(
            file if file in source.files else _FAST,
            f"lacks {_MARK}, so that it is not {_STARMIE}, which {_REVISION} reads; name that "
            "tokenizer (--set tokenizer=FOLDER)",
        )
    if (begin := added[_BEGIN].id) != ids["bos_id"]:
        raise ValueError(f"config.tokenizer.bos_id is {ids['bos_id']!r}, but {_BEGIN} is {begin}")
    templates = {**_TEMPLATES, **section(config, "templates")}
    for task, parts in _TEMPLATES.items():
        stated = templates[task]
        if not isinstance(stated, Mapping) or {*stated} != {*parts}:
            raise ValueError(f"config.tokenizer.templates.{task} must have {', '.join(parts)}")
        for name, found in stated.items():
            if not isinstance(found, list) or not all(
                type(i) is int and 0 <= i < n_vocab for i in found
            ):
                where = f"config.tokenizer.templates.{task}.{name}"
                raise ValueError(f"{where} is {found!r}, not ids below {n_vocab}")
    for key, i in ids.items():
        if type(i) is not int or not 0 <= i < n_vocab:
            raise ValueError(f"config.tokenizer.{key} is {i!r}, not an id below {n_vocab}")
    return ids, templates


def _prompt(templates: Mapping[str, Mapping[str, list[int]]]) -> PromptSpec:
    """moondream.py writes the suffix of a question twice (query, with reasoning off)."""

    def ids(task: str, part: str) -> tuple[str, ...]:
        return tuple(f"{{id:{i}}}" for i in templates[task][part])

    asked = (*ids("query", "prefix"), "{prompt}", *ids("query", "suffix") * 2)
    captions = {
        "caption" if length == "normal" else f"caption_{length}": length
        for length in _TEMPLATES["caption"]
    }
    finding = ("detect", "point")
    parts = {task: ids("caption", length) for task, length in captions.items()}
    parts |= {t: (*ids(t, "prefix"), " {prompt}", *ids(t, "suffix")) for t in finding}
    return PromptSpec(
        template=("{bos}", "{image}", *asked),
        text_template=("{bos}", *asked),
        tasks={
            **{task: f"{length} caption" for task, length in captions.items()},
            **{task: f"{task} {{prompt}}" for task in finding},
        },
        task_templates={task: ("{bos}", "{image}", *rest) for task, rest in parts.items()},
    )


# The names of timm, which the tower's room knows, and of transformers' Phi.
_VISION = (
    (r"patch_emb\.(.+)", r"patch_embed.proj.\1"),
    (r"pos_emb", "pos_embed"),
    (r"blocks\.(\d+)\.ln([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"post_ln\.(.+)", r"norm.\1"),
    (r"(blocks\.\d+\.(?:attn|mlp)\..+)", r"\1"),
)
_TEXT = (
    (r"wte", "embed_tokens.weight"),
    (r"blocks\.(\d+)\.ln\.(.+)", r"layers.\1.input_layernorm.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"layers.\1.self_attn.Wqkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"layers.\1.self_attn.dense.\2"),
    (r"blocks\.(\d+)\.(mlp\..+)", r"layers.\1.\2"),
    (r"post_ln\.(.+)", r"final_layernorm.\1"),
    (r"(lm_head\..+)", r"\1"),
)
_NAMES = (
    (re.compile(r"model\.vision\.proj_mlp\.(.+)"), r"projector.\1"),
    (re.compile(r"model\.region\.(.+)"), r"regions.\1"),
    *((re.compile(rf"model\.vision\.{a}"), f"vision.{b}") for a, b in _VISION),
    *((re.compile(rf"model\.text\.{a}"), f"decoder.{b}") for a, b in _TEXT),
)


def _locate(name: str) -> str | None:
    for pattern, target in _NAMES:
        if match := pattern.fullmatch(name):
            return match.expand(target)
    return None


FAMILY = Family(
    name="moondream2",
    license="apache-2.0",
    model_types=("moondream1",),
    describe=_describe,
    locate=_locate,
    tokenizer=_tokenizer,
    settings={_TOKENIZER: "folder or hub id of the tokenizer that its code reads"},
    refused={
        "moondream3": f"Moondream 3, whose decoder has experts and is not known; name {_REVISION}",
    },
)
