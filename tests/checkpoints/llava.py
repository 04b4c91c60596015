"""Tiny random checkpoints of LLaVA's shape, in the layouts in which the real ones are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.llava_tensors import LAYOUTS, tensors
from tests.checkpoints.llava_tokenizers import Tokens
from tests.checkpoints.paligemma import Tensors, write_safetensors, write_weights
from tests.checkpoints.vocabulary import write_json

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
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
    "llava-1.0": {"model_type": "llava", "vocabulary": "llava1", "projector": "linear"},
    "llava-phi3": {"model_type": "llava_phi", "vocabulary": "phi3", "projector": "mlp2x_gelu"},
    "llava-llama3": {
        "model_type": "llava_llama",
        "vocabulary": "llama3",
        "projector": "mlp2x_gelu",
        "kv_heads": 2,
        "text_config": {"rope_theta": 500000.0},
    },
    "firellava": {"projector": "mlp2x_gelu", "text_config": {"rope_theta": 1e6}},
}


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a tiny checkpoint.

    `tower` says where the vision tower is: "inside" the weights, or in a "folder" of its own,
    written beside the checkpoint as CLIP is published. `weights` is "safetensors" or "bin";
    `vocabulary`, `tokenizer` and `legacy` are those of llava_tokenizers.Tokens. `newline` is
    LLaVA-NeXT's, which ends the lines of a picture.
    """

    layout: str = "own"
    model_type: str = "palo"
    projector: str = "ldpnet"
    tower: str = "inside"
    weights: str = "safetensors"
    vocabulary: str = "llama"
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
    newline: bool = False

    @property
    def own(self) -> bool:
        """Whether the layout is that of the original projects."""
        return self.layout == "own"

    @property
    def tokens(self) -> Tokens:
        """The checkpoint's tokenizer."""
        return Tokens(self.vocabulary, self.own, self.tokenizer, self.legacy)

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding."""
        return self.tokens.rows

    @property
    def fused(self) -> bool:
        """Whether the decoder is Phi-3's, whose matrices hold several of LLaMA's."""
        return self.vocabulary == "phi3"


def write_llava(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint folder; the options are Tiny's fields. Returns the folder."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.with_name(folder.name + "-tower")
    write_json(folder / "config.json", _config(tiny, tower))
    write_json(
        folder / "generation_config.json",
        {**tiny.tokens.ids, "transformers_version": "4.31.0"},
    )
    tiny.tokens.write(folder)
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
            **tiny.tokens.ids,
            "attention_dropout": 0.0,
            "freeze_mm_mlp_adapter": False,
            "hidden_act": "silu",
            "image_aspect_ratio": "pad",
            "initializer_range": 0.02,
            "mm_hidden_size": tiny.vision_width,
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": None,
            "mm_projector_type": tiny.projector,
            "mm_use_im_patch_token": tiny.vocabulary == "llava1",
            "mm_use_im_start_end": tiny.vocabulary == "llava1",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(tower),
            "model_type": tiny.model_type,
            "pretraining_tp": 1,
            "tokenizer_model_max_length": 2048,
            "torch_dtype": tiny.dtype,
            "transformers_version": "4.31.0",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": False,
            "use_cache": True,
            "use_mm_proj": True,
            **tiny.config,
        }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": tiny.tokens.image,
        "model_type": "llava",
        "pad_token_id": 0,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "phi3" if tiny.fused else "llama",
            "torch_dtype": tiny.dtype,
            **tiny.tokens.ids,
            **text,
        },
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


def _write_tower(folder: Path, tiny: Tiny, vision: Tensors) -> None:
    """A CLIP folder as OpenAI published it: both towers, heads, stored position ids, no index."""
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
