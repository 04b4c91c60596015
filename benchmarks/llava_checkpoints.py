"""Tiny random checkpoints of LLaVA's shape, in the layouts in which the real ones are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.benchmarks.checkpoints import Tensors, write_safetensors, write_weights
from edgevlm.benchmarks.vocabulary import count_pieces, llama_model, write_json

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
# (vision, projector, decoder, lm_head) prefixes: LLaVA's own layout, transformers' two.
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
}
# Every model of this shape in its original project's layout, by what sets it apart.
ORIGINALS: dict[str, dict[str, Any]] = {
    "mobilepalo": {},
    "mobilepalo-bin": {"weights": "bin", "shards": 3, "dtype": "bfloat16"},
    "mobilepalo-tower": {"tower": "folder", "weights": "bin", "dtype": "float16"},
    "palo-7b": {"projector": "mlp2x_gelu"},
    "mobilevlm": {"model_type": "mobilevlm", "tower": "folder"},
    "mobilevlm-v2": {"model_type": "mobilevlm", "projector": "ldpnetv2", "tower": "folder"},
    "llava-1.5": {"model_type": "llava_llama", "projector": "mlp2x_gelu", "shards": 2},
    "llava-linear": {"model_type": "llava_llama", "projector": "linear", "tied": True},
    "bakllava": {"model_type": "llava_mistral", "projector": "mlp2x_gelu", "kv_heads": 2},
    "firellava": {"projector": "mlp2x_gelu", "text_config": {"rope_theta": 1e6}},
}


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a tiny checkpoint.

    `tower` says where the vision tower is: "inside" the weights, or in a "folder" of its own,
    written beside the checkpoint as CLIP is published. `weights` is "safetensors" or "bin";
    `tokenizer` names another tokenizer.model than the small one; where `legacy` is not set,
    transformers puts its space before a whole text only, not behind every special token.
    """

    layout: str = "own"
    model_type: str = "palo"
    projector: str = "ldpnet"
    tower: str = "inside"
    weights: str = "safetensors"
    tokenizer: Path | None = None
    legacy: bool = True
    shards: int = 1
    dtype: str = "float32"
    seed: int = 0
    size: int = 48
    patch: int = 4
    vision_width: int = 64
    vision_layers: int = 3
    vision_heads: int = 1
    vision_mlp: int = 128
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 512
    tied: bool = False
    text_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tower_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether the layout is that of the original projects."""
        return self.layout == "own"

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding: the pieces, and spare ones with `<image>` for transformers."""
        model = self.tokenizer.read_bytes() if self.tokenizer else llama_model()
        return count_pieces(model) + (0 if self.own else 64)


def write_llava(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint folder; the options are Tiny's fields. Returns the folder."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.with_name(folder.name + "-tower")
    write_json(folder / "config.json", _config(tiny, tower))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"},
    )
    _write_tokenizer(folder, tiny)
    data = tensors(tiny)
    vision, _, _, _ = LAYOUTS[tiny.layout]
    if not tiny.own:
        write_json(folder / "preprocessor_config.json", preprocessor(tiny.size))
    if tiny.tower == "folder":
        inside = {name: data.pop(name) for name in list(data) if name.startswith(vision)}
        _write_tower(tower, tiny, {n.removeprefix(vision): t for n, t in inside.items()})
    if tiny.weights == "bin":
        write_bin(folder, data, tiny.dtype, tiny.shards)
    else:
        write_weights(folder, data, tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny, tower: Path) -> dict[str, Any]:
    text: dict[str, Any] = {
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 2048,
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-05,
        "vocab_size": tiny.n_vocab,
        **({"tie_word_embeddings": True} if tiny.tied else {}),
        **tiny.text_config,
    }
    if tiny.own:
        return text | {
            "architectures": ["PaloForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freeze_mm_mlp_adapter": False,
            "hidden_act": "silu",
            "image_aspect_ratio": "pad",
            "initializer_range": 0.02,
            "mm_hidden_size": tiny.vision_width,
            "mm_projector_type": tiny.projector,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(tower),
            "model_type": tiny.model_type,
            "pad_token_id": 0,
            "tokenizer_model_max_length": 2048,
            "torch_dtype": tiny.dtype,
            "transformers_version": "4.31.0",
            "tune_mm_mlp_adapter": False,
            "use_cache": True,
            "use_mm_proj": True,
            **tiny.config,
        }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": count_pieces(llama_model()),
        "model_type": "llava",
        "pad_token_id": 0,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "torch_dtype": tiny.dtype, **text},
        "tie_word_embeddings": tiny.tied,
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.36.0.dev0",
        "vision_config": vision_config(tiny),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **tiny.config,
    }


def vision_config(tiny: Tiny) -> dict[str, Any]:
    """A tower's config with the keys that the published ones have."""
    return {
        "hidden_size": tiny.vision_width,
        "image_size": tiny.size,
        "intermediate_size": tiny.vision_mlp,
        "model_type": "clip_vision_model",
        "num_attention_heads": tiny.vision_heads,
        "num_hidden_layers": tiny.vision_layers,
        "patch_size": tiny.patch,
        "projection_dim": 32,
        "vocab_size": 32000,
        **tiny.tower_config,
    }


def preprocessor(size: int) -> dict[str, Any]:
    """preprocessor_config.json as OpenAI's towers have it: sizes are numbers."""
    return {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "size": size,
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
        for name, (rows, columns, gain) in shapes.items():
            out[f"layers.{i}.{name}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"layers.{i}.{name}.weight"] = 1 + normal(d, std=0.2)
        # Buffers that releases before 4.32 stored.
        out[f"layers.{i}.self_attn.rotary_emb.inv_freq"] = normal(d // tiny.heads // 2, std=1.0)
    signs = np.where(normal(d, std=1.0) > 0, np.float32(1), np.float32(-1))
    out["norm.weight"] = (1 + normal(d, std=0.2)) * signs if tiny.tied else 1 + normal(d, std=0.2)
    return out


def _write_tower(folder: Path, tiny: Tiny, vision: Tensors) -> None:
    """A CLIP folder as OpenAI published it: both halves, heads, stored position ids, no index."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": text,
        "vision_config": vision_config(tiny),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor(tiny.size))
    data = {f"vision_model.{name}": value for name, value in vision.items()}
    rest = {
        "logit_scale": np.ones(1, np.float32),
        "text_model.final_layer_norm.weight": np.ones(32, np.float32),
        "text_projection.weight": np.ones((32, 32), np.float32),
        "visual_projection.weight": np.ones((32, tiny.vision_width), np.float32),
    }
    write_safetensors(folder / "model.safetensors", data | rest, "float32")


def write_bin(folder: Path, data: Tensors, dtype: str, shards: int) -> None:
    """Writes pytorch_model.bin, or shards with their index, as transformers 4.31 did."""
    import torch

    state = {n: torch.from_numpy(v.copy()).to(getattr(torch, dtype)) for n, v in data.items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        torch.save({n: state[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)


def _write_tokenizer(folder: Path, tiny: Tiny) -> None:
    model = tiny.tokenizer.read_bytes() if tiny.tokenizer else llama_model()
    (folder / "tokenizer.model").write_bytes(model)
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": tiny.legacy,
        "model_max_length": 2048,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    if tiny.own:
        tokens = {k: {"__type": "AddedToken", "content": v, **special} for k, v in names.items()}
        write_json(folder / "tokenizer_config.json", config | tokens)
        return
    added = {
        0: "<unk>",
        1: "<s>",
        2: "</s>",
        count_pieces(llama_model()): "<image>",
        count_pieces(llama_model()) + 1: "<pad>",
    }
    entries = {str(i): {"content": t, **special, "special": True} for i, t in added.items()}
    more = {"added_tokens_decoder": entries, "pad_token": "<pad>", "trust_remote_code": False}
    write_json(folder / "tokenizer_config.json", config | names | more)
    _write_tokenizer_json(folder)


def _write_tokenizer_json(folder: Path) -> None:
    """The same tokenizer as transformers converts it, with `<image>` and `<pad>`."""
    from transformers import AutoTokenizer

    untyped: Any = AutoTokenizer
    untyped.from_pretrained(folder, use_fast=True).save_pretrained(folder)
