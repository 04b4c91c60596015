"""Tiny random checkpoints of Moondream2's shape, as its revision 2025-06-21 is published."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.vocabulary import write_json

STARMIE = "moondream/starmie-v1"
BEGIN = "<|endoftext|>"
MARKS = tuple(f"<|md_reserved_{i}|>" for i in range(20))
# Words of the templates, and of what is asked, so that some are merged across spaces.
_WORDS = (
    "query describe short normal long detect point what is in the picture? answer en "
    "a cat and a dog sit on the mat, 2024 times, in the picture of the red circle. "
) * 3
# As moondream.py has it, in which nothing but the tokenizer's name is read.
_CODE = """import torch.nn as nn
from tokenizers import Tokenizer


class MoondreamModel(nn.Module):
    def __init__(self, config, dtype=None, setup_caches=True):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer.from_pretrained("{0}")
"""


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a tiny checkpoint; as many layers of the tower as patches in a row, which
    the original takes for one number.

    `tokenizer` is where starmie's lies: in the checkpoint ("inside"), where that has the older
    revisions' ("stale"), or in a folder beside it of that name. `code` is the tokenizer that
    moondream.py names, None for no such file. `config` is stated in config.json beside the sizes.
    """

    seed: int = 0
    dtype: str = "float32"
    shards: int = 1
    tokenizer: str = "inside"
    code: str | None = STARMIE
    width: int = 256
    mlp: int = 512
    layers: int = 2
    heads: int = 4
    context: int = 2048
    vision_width: int = 64
    vision_mlp: int = 140
    vision_heads: int = 4
    patch: int = 14
    grid: int = 5
    margin: int = 1
    crops: int = 12
    projector: int = 256
    region: Mapping[str, int] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = "model."


def write_moondream2(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint into the folder and returns it; `changes` are those of Tiny."""
    tiny = Tiny(**changes)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", _config(tiny))
    write_json(folder / "generation_config.json", {"_from_model_config": True})
    if tiny.code is not None:
        (folder / "moondream.py").write_text(_CODE.format(tiny.code), encoding="utf-8")
    starmie = folder
    if tiny.tokenizer == "stale":
        _write_stale(folder)
        starmie = folder.with_name(folder.name + "-starmie")
        starmie.mkdir()
    (starmie / "tokenizer.json").write_text(starmie_json(), encoding="utf-8")
    write_weights(folder, tensors(tiny), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {
        "text": {
            "dim": tiny.width,
            "ff_dim": tiny.mlp,
            "n_layers": tiny.layers,
            "vocab_size": n_vocab(),
            "max_context": tiny.context,
            "n_heads": tiny.heads,
            "n_kv_heads": tiny.heads,
            "prefix_attn": tiny.grid**2 + 1,
        },
        "vision": {
            "enc_dim": tiny.vision_width,
            "enc_patch_size": tiny.patch,
            "enc_n_layers": tiny.grid,
            "enc_ff_dim": tiny.vision_mlp,
            "enc_n_heads": tiny.vision_heads,
            "proj_out_dim": tiny.width,
            "crop_size": tiny.patch * tiny.grid,
            "max_crops": tiny.crops,
            "overlap_margin": tiny.margin,
            "proj_inner_dim": tiny.projector,
        },
        "region": region(tiny),
        "tokenizer": {"templates": templates()},
    }
    for name, section in tiny.sections.items():
        sections[name] = {**sections.get(name, {}), **section}
    return {
        "architectures": ["HfMoondream"],
        "auto_map": {
            "AutoConfig": "hf_moondream.HfConfig",
            "AutoModelForCausalLM": "hf_moondream.HfMoondream",
        },
        "config": sections,
        "model_type": "moondream1",
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.52.4",
        **tiny.config,
    }


def region(tiny: Tiny) -> dict[str, int]:
    """Sizes of the region model; bins are few, so that objects are found within them."""
    return {
        "dim": tiny.width,
        "coord_feat_dim": 16,
        "coord_out_dim": 64,
        "size_feat_dim": 32,
        "size_out_dim": 128,
        "inner_dim": 128,
        **tiny.region,
    }


@functools.cache
def starmie_json() -> str:
    """A byte-level BPE whose tokens may be several words, as starmie-v1's: before any merge a text
    is cut at digits alone, which llama.cpp has no name for.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    made: Any = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[BEGIN, *MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=12,
    )
    # One word after the other first, so that what the templates name are tokens.
    made.train_from_iterator([*_WORDS.split(), _WORDS], trainer)
    return str(made.to_str())


@functools.cache
def starmie() -> Any:
    """The same tokenizer as the package has it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(starmie_json())


def n_vocab() -> int:
    """Rows of the vocabulary: a few more than the tokenizer has tokens."""
    return int(starmie().get_vocab_size()) + 12


def templates() -> dict[str, dict[str, list[int]]]:
    """The templates of the published revision, by this tokenizer."""

    def ids(text: str) -> list[int]:
        return list(starmie().encode(text).ids)

    def asked(task: str) -> dict[str, list[int]]:
        return {"prefix": [1, *ids(task), 2], "suffix": [3]}

    lengths = ("short", "normal", "long")
    return {
        "caption": {n: [1, *ids("describe"), 2, *ids(n), 3] for n in lengths},
        **{task: asked(task) for task in ("query", "detect", "point")},
    }


def _write_stale(folder: Path) -> None:
    """Writes the tokenizer of the revisions before, of GPT-2's kind, which still lies there."""
    stale = json.loads(starmie_json())
    stale["added_tokens"] = [{**stale["added_tokens"][0], "id": len(stale["model"]["vocab"])}]
    del stale["model"]["vocab"][BEGIN]
    (folder / "tokenizer.json").write_text(json.dumps(stale), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CodeGenTokenizer"})
    write_json(folder / "added_tokens.json", {" " * 31: 50257})


def tensors(tiny: Tiny) -> Tensors:
    """Random weights by source name, scaled so that logits have a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    out: Tensors = {}

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    def linear(name: str, columns: int, rows: int, gain: float = 1.0) -> None:
        out[f"{name}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
        out[f"{name}.bias"] = normal(rows, std=0.2)

    def norm(name: str, width: int) -> None:
        out[f"{name}.weight"] = normal(width, std=0.2) + np.float32(1)
        out[f"{name}.bias"] = normal(width, std=0.2)

    v, m, p = f"{tiny.prefix}vision.", tiny.vision_width, tiny.vision_mlp
    linear(f"{v}patch_emb", 3 * tiny.patch**2, m, 2.0)
    out[f"{v}pos_emb"] = normal(1, tiny.grid**2, m, std=0.5)
    for i in range(tiny.grid):
        block = f"{v}blocks.{i}."
        norm(f"{block}ln1", m)
        norm(f"{block}ln2", m)
        linear(f"{block}attn.qkv", m, 3 * m, 1.5)
        linear(f"{block}attn.proj", m, m)
        linear(f"{block}mlp.fc1", m, p, 1.5)
        linear(f"{block}mlp.fc2", p, m)
    norm(f"{v}post_ln", m)
    linear(f"{v}proj_mlp.fc1", 2 * m, tiny.projector, 1.5)
    linear(f"{v}proj_mlp.fc2", tiny.projector, tiny.width, 1.5)
    t, d = f"{tiny.prefix}text.", tiny.width
    out[f"{t}wte"] = normal(n_vocab(), d, std=1.0)
    for i in range(tiny.layers):
        block = f"{t}blocks.{i}."
        norm(f"{block}ln", d)
        linear(f"{block}attn.qkv", d, 3 * d, 2.0)
        linear(f"{block}attn.proj", d, d, 2.0)
        linear(f"{block}mlp.fc1", d, tiny.mlp, 1.5)
        linear(f"{block}mlp.fc2", tiny.mlp, d, 2.0)
    norm(f"{t}post_ln", d)
    linear(f"{t}lm_head", d, n_vocab(), 5.0)
    r, sizes = f"{tiny.prefix}region.", region(tiny)
    for kind in ("coord", "size"):
        features, n, inner = (
            sizes[f"{kind}_feat_dim"],
            sizes[f"{kind}_out_dim"],
            sizes["inner_dim"],
        )
        out[f"{r}{kind}_features"] = normal({"coord": 1, "size": 2}[kind], features // 2, std=1.0)
        linear(f"{r}{kind}_encoder", features, d, 1.5)
        linear(f"{r}{kind}_decoder.fc1", d, inner)
        linear(f"{r}{kind}_decoder.fc2", inner, n, 3.0)
    return out
