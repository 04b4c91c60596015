"""Random tensors of LLaVA's shape by the names of each layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints.paligemma import Tensors

if TYPE_CHECKING:
    from tests.checkpoints.llava import Tiny

# (vision, projector, decoder, lm_head) prefixes: LLaVA's own layout, transformers' three.
LAYOUTS = {
    "own": (
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        "model.",
        "lm_head.weight",
    ),
    "hf": (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.weight",
    ),
    "hf-4.52": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.weight",
    ),
    "hf-5": (
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.weight",
    ),
}


def tensors(tiny: Tiny) -> Tensors:
    """Random weights by source name, scaled so that logits have a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    vision, projector, decoder, lm_head = LAYOUTS[tiny.layout]

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    out = {vision + k: v for k, v in _vision(tiny, normal).items()}
    out |= {projector + k: v for k, v in _projector(tiny, normal).items()}
    out |= {decoder + k: v for k, v in _decoder(tiny, normal).items()}
    if not tiny.tied:
        out[lm_head] = normal(tiny.n_vocab, tiny.width, std=5 * tiny.width**-0.5)
    if tiny.newline:
        out["image_newline" if tiny.layout == "hf" else "model.image_newline"] = normal(
            tiny.width, std=1.0
        )
    return out


Normal = Callable[..., NDArray[np.float32]]


def _linear(name: str, rows: int, columns: int, gain: float, normal: Normal) -> Tensors:
    return {
        f"{name}.weight": normal(rows, columns, std=gain * columns**-0.5),
        f"{name}.bias": normal(rows, std=0.1),
    }


def _norm(name: str, width: int, normal: Normal) -> Tensors:
    return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.1)}


def _vision(tiny: Tiny, normal: Normal) -> Tensors:
    d, mlp = tiny.vision_width, tiny.vision_mlp
    positions = (tiny.size // tiny.patch) ** 2 + 1
    out: Tensors = {
        "embeddings.class_embedding": normal(d, std=0.5),
        "embeddings.patch_embedding.weight": normal(d, 3, tiny.patch, tiny.patch, std=0.1),
        "embeddings.position_embedding.weight": normal(positions, d, std=0.5),
    }
    out |= _norm("pre_layrnorm", d, normal) | _norm("post_layernorm", d, normal)
    for i in range(tiny.vision_layers):
        p = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            gain = 2.0 if name in ("q_proj", "k_proj") else 1.0
            out |= _linear(f"{p}self_attn.{name}", d, d, gain, normal)
        out |= _linear(f"{p}mlp.fc1", mlp, d, 1.0, normal)
        out |= _linear(f"{p}mlp.fc2", d, mlp, 1.0, normal)
        out |= _norm(f"{p}layer_norm1", d, normal) | _norm(f"{p}layer_norm2", d, normal)
    return out


def _projector(tiny: Tiny, normal: Normal) -> Tensors:
    d, width = tiny.vision_width, tiny.width
    kind = tiny.projector if tiny.own else "hf"
    if kind == "linear":
        named = _linear("x", width, d, 1.0, normal)
        return {name.removeprefix("x."): value for name, value in named.items()}
    first, second = {
        "hf": ("linear_1", "linear_2"),
        "ldpnet": ("model.mlp.1", "model.mlp.3"),
        "ldpnetv2": ("mlp.mlp.0", "mlp.mlp.2"),
    }.get(kind, ("0", "2"))
    out = _linear(first, width, d, 1.0, normal) | _linear(second, width, width, 1.5, normal)
    if kind == "ldpnet":
        out |= _ldp_blocks(width, normal)
    if kind == "ldpnetv2":
        out["peg.peg.0.weight"] = normal(width, 1, 3, 3, std=0.3)
        out["peg.peg.0.bias"] = normal(width, std=0.1)
    return out


def _ldp_blocks(d: int, normal: Normal) -> Tensors:
    out: Tensors = {}
    for k in (1, 2):
        block = f"model.mb_block.{k}.block."
        out[f"{block}0.0.weight"] = normal(d, 1, 3, 3, std=0.4)
        out[f"{block}1.fc1.weight"] = normal(d // 4, d, 1, 1, std=2 * d**-0.5)
        out[f"{block}1.fc1.bias"] = normal(d // 4, std=0.1)
        out[f"{block}1.fc2.weight"] = normal(d, d // 4, 1, 1, std=2 * (d // 4) ** -0.5)
        out[f"{block}1.fc2.bias"] = normal(d, std=0.1)
        out[f"{block}2.0.weight"] = normal(d, d, 1, 1, std=d**-0.5)
        out |= _norm(f"{block}0.1", d, normal) | _norm(f"{block}2.1", d, normal)
    return out


def _decoder(tiny: Tiny, normal: Normal) -> Tensors:
    d, mlp = tiny.width, tiny.mlp
    kv = tiny.kv_heads * (d // tiny.heads)
    shapes = {
        "self_attn.q_proj": (d, d, 2.0),
        "self_attn.k_proj": (kv, d, 2.0),
        "self_attn.v_proj": (kv, d, 2.0),
        "self_attn.o_proj": (d, d, 2.0),
        "mlp.gate_proj": (mlp, d, 1.5),
        "mlp.up_proj": (mlp, d, 1.5),
        "mlp.down_proj": (d, mlp, 2.0),
    }
    out: Tensors = {
        "embed_tokens.weight": normal(tiny.n_vocab, d, std=1.0 if not tiny.tied else 0.3)
    }
    for i in range(tiny.layers):
        layer = {
            name: normal(rows, columns, std=gain * columns**-0.5)
            for name, (rows, columns, gain) in shapes.items()
        }
        if tiny.fused:
            layer = _fused(layer)
        out |= {f"layers.{i}.{name}.weight": value for name, value in layer.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"layers.{i}.{name}.weight"] = 1 + normal(d, std=0.2)
        # Buffers that releases before 4.32 stored.
        out[f"layers.{i}.self_attn.rotary_emb.inv_freq"] = normal(d // tiny.heads // 2, std=1.0)
    signs = np.where(normal(d, std=1.0) > 0, np.float32(1), np.float32(-1))
    out["norm.weight"] = (1 + normal(d, std=0.2)) * signs if tiny.tied else 1 + normal(d, std=0.2)
    return out


def _fused(layer: Tensors) -> Tensors:
    """LLaMA's matrices of a layer as Phi-3 has them."""
    out = dict(layer)
    qkv = [out.pop(f"self_attn.{name}_proj") for name in "qkv"]
    up = [out.pop(f"mlp.{name}_proj") for name in ("gate", "up")]
    return out | {
        "self_attn.qkv_proj": np.concatenate(qkv),
        "mlp.gate_up_proj": np.concatenate(up),
    }
