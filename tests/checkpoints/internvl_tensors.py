"""Sizes and random tensors of a tiny InternVL, under the names of each layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tests.checkpoints.paligemma import Tensors
from tests.checkpoints.qwen2_vocabulary import Files

Layout = Literal["own", "hf", "hf-old"]


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; `processor` overrides keys of preprocessor_config.json, `chat` is
    its chat template ("" the published one, None no file), `conversation` its conversation.py.
    "hf-old" has the names of transformers before 4.52. `n_vocab` are the tables' rows, 0 a few more
    than tokens; without `weights` whoever calls writes them.
    """

    layout: Layout = "hf"
    files: Files = "json"
    internlm2: bool = False
    tied: bool = False
    bias: bool = True
    size: int = 32
    patch: int = 4
    factor: int = 2
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 128
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    dtype: str = "float32"
    seed: int = 0
    shards: int = 1
    n_vocab: int = 0
    weights: bool = True
    chat: str | None = ""
    conversation: str = ""
    processor: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Image embeddings of a tile."""
        return (self.size // self.patch // self.factor) ** 2


def tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    made: Tensors = {}

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        made[name] = (rng.normal(size=shape) * spread).astype(np.float32)

    def norm(name: str, width: int, *, bias: bool) -> None:
        made[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=width)).astype(np.float32)
        if bias:
            add(f"{name}.bias", width, scale=0.1)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0.1)

    v, patch = tiny.vision_width, (tiny.vision_width, 3, tiny.patch, tiny.patch)
    add("cls", 1, 1, v, scale=1)
    add("positions", 1, 1 + (tiny.size // tiny.patch) ** 2, v)
    add("patches.weight", *patch, scale=(3 * tiny.patch**2) ** -0.5)
    add("patches.bias", v, scale=0.1)
    for i in range(tiny.vision_layers):
        layer = f"vit.{i}."
        norm(f"{layer}norm1", v, bias=True)
        norm(f"{layer}norm2", v, bias=True)
        add(f"{layer}ls1", v, scale=0.7)
        add(f"{layer}ls2", v, scale=0.7)
        linear(f"{layer}attn.qkv", 3 * v, v)
        if not tiny.bias:
            del made[f"{layer}attn.qkv.bias"]
        linear(f"{layer}attn.proj", v, v)
        linear(f"{layer}mlp.fc1", tiny.vision_mlp, v)
        linear(f"{layer}mlp.fc2", v, tiny.vision_mlp)
    d, merged = tiny.width, v * tiny.factor**2
    norm("mlp1.0", merged, bias=True)
    linear("mlp1.1", d, merged)
    linear("mlp1.3", d, d)
    add("embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"layers.{i}."
        norm(f"{layer}input_layernorm", d, bias=False)
        norm(f"{layer}post_attention_layernorm", d, bias=False)
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{layer}self_attn.{part}", rows, d)
        if tiny.internlm2:
            _as_internlm2(made, f"{layer}self_attn.", tiny)
        add(f"{layer}self_attn.o_proj.weight", d, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm("norm", d, bias=False)
    if not tiny.tied:
        add("lm_head.weight", vocab, d, scale=5 * d**-0.5)
    rename = _own_name if tiny.layout == "own" else _hf_name
    rename = _internlm2_name if tiny.internlm2 and tiny.layout == "own" else rename
    named: Tensors = {}
    for name, values in made.items():
        if ".qkv." in name and tiny.layout != "own":
            for part, rows_of in zip("qkv", np.split(values, 3), strict=True):
                target = name.replace("attn.qkv", f"attention.{part}_proj")
                named[_hf_name(target, tiny.layout)] = np.ascontiguousarray(rows_of)
        else:
            named[rename(name, tiny.layout)] = values
    return named


def _as_internlm2(made: Tensors, stem: str, tiny: Tiny) -> None:
    """Queries, keys and values as InternLM2 has them: without biases, and in its own layout in one,
    group by group.
    """
    for x in "qkv":
        del made[f"{stem}{x}_proj.bias"]
    if tiny.layout != "own":
        return
    n, side = tiny.kv_heads, tiny.width // tiny.heads
    parts = [made.pop(f"{stem}{x}_proj.weight").reshape(n, -1, side, tiny.width) for x in "qkv"]
    made[f"{stem}wqkv.weight"] = np.concatenate(parts, 1).reshape(-1, tiny.width)


def _internlm2_name(name: str, layout: Layout) -> str:
    if name == "lm_head.weight":
        return "language_model.output.weight"
    for own, theirs in (
        ("embed_tokens", "tok_embeddings"),
        ("self_attn.wqkv", "attention.wqkv"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(own, theirs)
    return _own_name(name, layout)


def _own_name(name: str, _: Layout) -> str:
    head, _dot, rest = name.partition(".")
    vision = {
        "cls": "class_embedding",
        "positions": "position_embedding",
        "patches": f"patch_embedding.{rest}",
    }
    if head in vision:
        return f"vision_model.embeddings.{vision[head]}"
    if head == "vit":
        return f"vision_model.encoder.layers.{rest}"
    if head == "mlp1":
        return name
    return f"language_model.{name}" if head == "lm_head" else f"language_model.model.{name}"


def _hf_name(name: str, layout: Layout) -> str:
    head, _dot, rest = name.partition(".")
    before = "" if layout == "hf-old" else "model."
    vision = {
        "cls": "cls_token",
        "positions": "position_embeddings",
        "patches": f"patch_embeddings.projection.{rest}",
    }
    if head in vision:
        return f"{before}vision_tower.embeddings.{vision[head]}"
    if head == "vit":
        for own, theirs in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("ls1", "lambda_1"),
            ("ls2", "lambda_2"),
            ("attn.proj", "attention.projection_layer"),
        ):
            rest = rest.replace(own, theirs)
        return f"{before}vision_tower.encoder.layer.{rest}"
    if head == "mlp1":
        number, _dot, kind = rest.partition(".")
        part = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}[number]
        return f"{before}multi_modal_projector.{part}.{kind}"
    if head == "lm_head":
        return f"language_model.{name}" if layout == "hf-old" else name
    return f"language_model.model.{name}" if layout == "hf-old" else f"model.language_model.{name}"
