"""Tiny random checkpoints of LLaVA-OneVision, in transformers' layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.qwen2_vocabulary import write_qwen2
from tests.checkpoints.vocabulary import write_json

SIZE, PATCH = 32, 4
PINPOINTS = [[SIZE * a, SIZE * b] for a in range(1, 4) for b in range(1, 4)]
# (tower, projector, newline, decoder, output table) by release.
_NAMES = {
    "hf": ("vision_tower.vision_model.", "multi_modal_projector.", "image_newline",
           "language_model.model.", "language_model.lm_head.weight"),
    "hf-4.52": ("model.vision_tower.vision_model.", "model.multi_modal_projector.",
                "model.image_newline", "model.language_model.", "lm_head.weight"),
    "hf-5": ("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline",
             "model.language_model.", "lm_head.weight"),
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; mappings override keys of its files, None leaves a file out."""

    layout: str = "hf"
    tied: bool = True
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
    most: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] | None = field(default_factory=dict)
    nested: Mapping[str, Any] = field(default_factory=dict)


def write_onevision(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_qwen2(folder, ("<image>", "<video>"))
    vocab = len(tokens) + 5  # Rows that no token has, as the published tables.
    write_json(folder / "config.json", _config(tiny, tokens, vocab))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]},
    )
    if tiny.processor is not None:
        write_json(folder / "preprocessor_config.json", _pictures() | dict(tiny.processor))
    nested = {
        "image_token": "<image>",
        "num_image_tokens": (SIZE // PATCH) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": f"anyres_max_{tiny.most}",
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "processor_config.json", nested | dict(tiny.nested))
    write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny, tokens: Mapping[str, int], vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": tokens["<image>"],
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": tokens["<|endoftext|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "hidden_size": tiny.width,
            "intermediate_size": tiny.mlp,
            "max_position_embeddings": 8192,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": tiny.heads,
            "num_hidden_layers": tiny.layers,
            "num_key_value_heads": tiny.kv_heads,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": tiny.tied,
            "torch_dtype": tiny.dtype,
            "vocab_size": vocab,
            **tiny.text_config,
        },
        "tie_word_embeddings": False,
        "torch_dtype": tiny.dtype,
        "use_image_newline_parameter": True,
        "video_token_index": tokens["<video>"],
        "vision_aspect_ratio": f"anyres_max_{tiny.most}",
        "vision_config": {
            "hidden_size": tiny.vision_width,
            "image_size": SIZE,
            "intermediate_size": tiny.vision_mlp,
            "model_type": "siglip_vision_model",
            "num_attention_heads": tiny.vision_heads,
            "num_hidden_layers": tiny.vision_layers,
            "patch_size": PATCH,
            "vision_use_head": False,
            **tiny.vision_config,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **tiny.config,
    }


def _pictures() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    vision, projector, newline, decoder, lm_head = _NAMES[tiny.layout]
    made: Tensors = {}

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        made[name] = (rng.normal(size=shape) * spread).astype(np.float32)

    def norm(name: str, width: int, *, bias: bool = True) -> None:
        made[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=width)).astype(np.float32)
        if bias:
            add(f"{name}.bias", width, scale=0.1)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0.1)

    v = tiny.vision_width
    add(f"{vision}embeddings.patch_embedding.weight", v, 3, PATCH, PATCH, scale=0.15)
    add(f"{vision}embeddings.patch_embedding.bias", v, scale=0.1)
    add(f"{vision}embeddings.position_embedding.weight", (SIZE // PATCH) ** 2, v)
    for i in range(tiny.vision_layers):
        layer = f"{vision}encoder.layers.{i}."
        norm(f"{layer}layer_norm1", v)
        norm(f"{layer}layer_norm2", v)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", v, v)
        linear(f"{layer}mlp.fc1", tiny.vision_mlp, v)
        linear(f"{layer}mlp.fc2", v, tiny.vision_mlp)
    # It is there, and nobody reads it.
    norm(f"{vision}post_layernorm", v)
    d = tiny.width
    linear(f"{projector}linear_1", d, v)
    linear(f"{projector}linear_2", d, d)
    add(newline, d, scale=1)
    add(f"{decoder}embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"{decoder}layers.{i}."
        norm(f"{layer}input_layernorm", d, bias=False)
        norm(f"{layer}post_attention_layernorm", d, bias=False)
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{layer}self_attn.{part}", rows, d)
        add(f"{layer}self_attn.o_proj.weight", d, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm(f"{decoder}norm", d, bias=False)
    if not tiny.tied:
        add(lm_head, vocab, d, scale=5 * d**-0.5)
    return made
