"""Tiny random PaliGemma checkpoints in the layouts in which the real ones are published."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints.vocabulary import n_pieces, write_json, write_tokenizer

Tensors = dict[str, NDArray[np.float32]]

# (vision, projector, language model, lm_head) prefixes of the layouts a-c.
LAYOUTS = {
    "a": (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.weight",
    ),
    "b": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.weight",
    ),
    "c": (
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.weight",
    ),
}


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a tiny checkpoint; widths divide as K-quants need (256)."""

    version: int = 1
    layout: str = "a"
    shards: int = 1
    size: int = 56
    patch: int = 14
    dtype: str = "float32"
    seed: int = 0
    tokenizer: str = "model"
    lm_head: bool = False
    outliers: bool = False
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 140
    width: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 64
    mlp: int = 512
    spare_rows: int = 64
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], None] | None = None

    @property
    def n_kv(self) -> int:
        """Key and value heads: one for Gemma 1, grouped for Gemma 2."""
        return self.kv_heads or (1 if self.version == 1 else 2)

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding: the pieces, `<image>`, then rows that no token has."""
        return n_pieces() + self.spare_rows

    @property
    def tokens(self) -> int:
        """Rows that a picture takes."""
        return (self.size // self.patch) ** 2


def write_paligemma(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint folder; the options are Tiny's fields. Returns the folder."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(tiny))
    write_json(folder / "preprocessor_config.json", preprocessor(tiny.size, tiny.tokens))
    write_json(folder / "generation_config.json", _generation(tiny))
    write_tokenizer(folder, tiny.tokenizer)
    data = tensors(tiny)
    if tiny.edit:
        tiny.edit(data)
    write_weights(folder, data, tiny.dtype, tiny.shards)
    return folder


def config(tiny: Tiny) -> dict[str, Any]:
    """config.json with the keys that the published files have, and no others."""
    text: dict[str, Any] = {
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "model_type": "gemma" if tiny.version == 1 else "gemma2",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_image_tokens": tiny.tokens,
        "num_key_value_heads": tiny.n_kv,
        "torch_dtype": tiny.dtype,
        "vocab_size": tiny.n_vocab,
        # The one key that only tiny models need: every published one has heads of 256.
        "head_dim": tiny.head_dim,
    }
    if tiny.version == 2:
        text |= {
            "attn_logit_softcapping": 50.0,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": tiny.head_dim,
            "sliding_window": 4096,
            "use_cache": True,
        }
    vision = {
        "hidden_size": tiny.vision_width,
        "intermediate_size": tiny.vision_mlp,
        "model_type": "siglip_vision_model",
        "num_attention_heads": tiny.vision_heads,
        "num_hidden_layers": tiny.vision_layers,
        "num_image_tokens": tiny.tokens,
        "patch_size": tiny.patch,
        "projection_dim": tiny.width,
        "torch_dtype": tiny.dtype,
        "vision_use_head": False,
    }
    if tiny.size != 224:
        vision["image_size"] = tiny.size
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": tiny.width,
        "image_token_index": n_pieces(),
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": tiny.width,
        "text_config": text | dict(tiny.text_config),
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.47.0.dev0",
        "vision_config": vision | dict(tiny.vision_config),
        **({"_vocab_size": n_pieces()} if tiny.version == 2 else {"vocab_size": tiny.n_vocab}),
    }


def preprocessor(size: int, tokens: int) -> dict[str, Any]:
    """preprocessor_config.json as published, for pictures of `size` pixels and `tokens` rows."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": tokens,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def _generation(tiny: Tiny) -> dict[str, Any]:
    extra = {} if tiny.version == 1 else {"cache_implementation": "hybrid"}
    eos_and_pad = {"eos_token_id": 1, "pad_token_id": 0}
    return {"_from_model_config": True, "bos_token_id": 2, **extra, **eos_and_pad}


def tensors(tiny: Tiny) -> Tensors:
    """Random weights by source name, scaled so that logits have a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    vision, projector, decoder, lm_head = LAYOUTS[tiny.layout]

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    out = {vision + k: v for k, v in vision_tensors(tiny, normal).items()}
    # Image rows as large as the text rows are after Gemma's sqrt(width).
    row_std = 0.3 * tiny.width**0.5
    out[projector + "linear.weight"] = normal(
        tiny.width, tiny.vision_width, std=row_std * tiny.vision_width**-0.5
    )
    out[projector + "linear.bias"] = normal(tiny.width, std=0.1)
    out |= {decoder + k: v for k, v in _decoder(tiny, normal).items()}
    if tiny.lm_head:
        out[lm_head] = out[decoder + "embed_tokens.weight"].copy()
    return out


Normal = Callable[..., NDArray[np.float32]]


def vision_tensors(tiny: Any, normal: Normal) -> Tensors:
    """Random weights of a SigLIP tower of the sizes in `tiny`."""
    d, m, patches = tiny.vision_width, tiny.vision_mlp, (tiny.size // tiny.patch) ** 2
    out = {
        "embeddings.patch_embedding.weight": normal(d, 3, tiny.patch, tiny.patch, std=0.06),
        "embeddings.patch_embedding.bias": normal(d, std=0.1),
        "embeddings.position_embedding.weight": normal(patches, d, std=0.5),
    }
    for i in range(tiny.vision_layers):
        p = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            std = (2.0 if name in ("q_proj", "k_proj") else 1.0) * d**-0.5
            out[f"{p}self_attn.{name}.weight"] = normal(d, d, std=std)
            out[f"{p}self_attn.{name}.bias"] = normal(d, std=0.1)
        out[p + "mlp.fc1.weight"], out[p + "mlp.fc1.bias"] = (
            normal(m, d, std=d**-0.5),
            normal(m, std=0.1),
        )
        out[p + "mlp.fc2.weight"], out[p + "mlp.fc2.bias"] = (
            normal(d, m, std=m**-0.5),
            normal(d, std=0.1),
        )
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{p}{name}.weight"] = 1 + normal(d, std=0.2)
            out[f"{p}{name}.bias"] = normal(d, std=0.1)
        if getattr(tiny, "outliers", False):
            # A few channels far larger than the rest, as trained SigLIP towers have.
            out[p + "mlp.fc2.bias"][:2] += 30.0
            out[p + "layer_norm1.weight"][2:4] *= 8.0
    out["post_layernorm.weight"] = 1 + normal(d, std=0.2)
    out["post_layernorm.bias"] = normal(d, std=0.1)
    return out


def _decoder(tiny: Tiny, normal: Normal) -> Tensors:
    d, m, h = tiny.width, tiny.mlp, tiny.head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if tiny.version == 2:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes = {
        "self_attn.q_proj": (tiny.heads * h, d, 2.0),
        "self_attn.k_proj": (tiny.n_kv * h, d, 2.0),
        "self_attn.v_proj": (tiny.n_kv * h, d, 3.0),
        "self_attn.o_proj": (d, tiny.heads * h, 6.0),
        "mlp.gate_proj": (m, d, 1.5),
        "mlp.up_proj": (m, d, 1.5),
        "mlp.down_proj": (d, m, 3.0),
    }
    out = {"embed_tokens.weight": normal(tiny.n_vocab, d, std=0.3)}
    for i in range(tiny.layers):
        for name, (rows, columns, gain) in shapes.items():
            out[f"layers.{i}.{name}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
        for name in norms:
            out[f"layers.{i}.{name}.weight"] = normal(d, std=0.2)
        if tiny.version == 2:
            # Without a gain the normed branches would vanish beside the token's own row.
            out[f"layers.{i}.post_attention_layernorm.weight"] += 7.0
            out[f"layers.{i}.post_feedforward_layernorm.weight"] += 3.0
    # Random signs (the norm scales by 1 + weight): the output table is the input table, and with a
    # positive scale every answer would repeat its last token.
    out["norm.weight"] = normal(d, std=0.2) - 2 * (normal(d, std=1.0) > 0)
    return out


def write_weights(folder: Path, data: Tensors, dtype: str, shards: int) -> None:
    """Writes model.safetensors, or shards with model.safetensors.index.json."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", data, dtype)
        return
    names = list(data)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(folder / file, {n: data[n] for n in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(a.size for a in data.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_safetensors(path: Path, data: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """Writes a safetensors file of "float32", "float16" or "bfloat16" tensors."""
    with path.open("wb") as f:
        f.write(header({name: array.shape for name, array in data.items()}, dtype))
        for array in data.values():
            f.write(encode(array, dtype))


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """What a safetensors file begins with: a length and a JSON header; the raw tensors follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * (4 if dtype == "float32" else 2)
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def encode(array: NDArray[np.float32], dtype: str) -> bytes:
    """The values as a safetensors file stores them; bfloat16 is rounded to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2").tobytes()
    return array.astype("<f4" if dtype == "float32" else "<f2").tobytes()
