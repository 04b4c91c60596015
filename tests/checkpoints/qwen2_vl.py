"""Tiny random checkpoints of Qwen2-VL and Qwen2.5-VL, as published and as transformers saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.qwen2_vocabulary import Files, trained, write_qwen2
from tests.checkpoints.vocabulary import grown, write_json

# As the published tokenizers have them, behind Qwen2's own.
ADDED = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# The one that is published, but for videos and numbered pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint. `nested` is transformers' layout from 4.52 on, in names and in
    config.json; `new` is Qwen2.5-VL. `chat` is its chat template, None for no file, `mrope` the
    name that the kind of positions has. `n_vocab` are the tables' rows, 0 a few more than tokens;
    without `weights` whoever calls writes them.
    """

    new: bool = False
    nested: bool = False
    files: Files = "json"
    tied: bool = True
    mrope: Literal["mrope", "default", "5"] = "mrope"
    patch: int = 4
    vision_width: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 96
    window: int = 16
    full_layers: tuple[int, ...] = (1,)
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    min_pixels: int = 256
    max_pixels: int = 6400
    dtype: str = "float32"
    seed: int = 0
    shards: int = 1
    n_vocab: int = 0
    weights: bool = True
    chat: str | None = CHAT_TEMPLATE
    processor: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its `model_type`."""
        return "qwen2_5_vl" if self.new else "qwen2_vl"


def write_qwen2_vl(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_qwen2(folder, ADDED, tiny.files, grown(trained(), tiny.n_vocab))
    vocab = tiny.n_vocab or len(tokens) + 3  # Rows that no token has, as the published tables.
    write_json(folder / "config.json", _config(tiny, tokens, vocab))
    ends = [tokens["<|im_end|>"], tokens["<|endoftext|>"]]
    write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": ends})
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": tiny.min_pixels,
            "max_pixels": tiny.max_pixels,
            "patch_size": tiny.patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            **tiny.processor,
        },
    )
    if tiny.chat is not None:
        write_json(folder / "chat_template.json", {"chat_template": tiny.chat})
    if tiny.weights:
        write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny, tokens: Mapping[str, int], vocab: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    if tiny.mrope == "default":
        rope |= {"type": "default", "rope_type": "default"}
    text: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 8192,
        "max_window_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": rope,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tiny.tied,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }
    if tiny.mrope == "5":
        del text["rope_scaling"]
        theta = text.pop("rope_theta")
        sections = {"mrope_section": rope["mrope_section"]}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **sections}
    text |= tiny.text_config
    vision: dict[str, Any] = {
        "depth": tiny.vision_layers,
        "in_chans": 3,
        "num_heads": tiny.vision_heads,
        "patch_size": tiny.patch,
        "spatial_merge_size": 2,
        "spatial_patch_size": tiny.patch,
        "temporal_patch_size": 2,
    }
    if tiny.new:
        vision |= {
            "fullatt_block_indexes": list(tiny.full_layers),
            "hidden_act": "silu",
            "hidden_size": tiny.vision_width,
            "intermediate_size": tiny.vision_mlp,
            "out_hidden_size": tiny.width,
            "tokens_per_second": 2,
            "window_size": tiny.window,
        }
    else:
        vision |= {"embed_dim": tiny.vision_width, "hidden_size": tiny.width, "mlp_ratio": 2}
    vision |= tiny.vision_config
    shared = {
        "architectures": [f"Qwen2{'_5_' if tiny.new else ''}VLForConditionalGeneration"],
        "image_token_id": tokens["<|image_pad|>"],
        "model_type": tiny.kind,
        "torch_dtype": tiny.dtype,
        "video_token_id": tokens["<|video_pad|>"],
        "vision_config": {**vision, "model_type": tiny.kind},
        "vision_end_token_id": tokens["<|vision_end|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_token_id": tokens["<|vision_pad|>"],
    }
    if tiny.nested:
        text = {"text_config": {**text, "model_type": f"{tiny.kind}_text"}}
        text["tie_word_embeddings"] = tiny.tied
    return {**text, **shared, **tiny.config}


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    made: Tensors = {}
    vision, text = (
        ("model.visual.", "model.language_model.") if tiny.nested else ("visual.", "model.")
    )

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        made[name] = (rng.normal(size=shape) * spread).astype(np.float32)

    def norm(name: str, width: int, *, bias: bool = False) -> None:
        made[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=width)).astype(np.float32)
        if bias:
            add(f"{name}.bias", width, scale=0.1)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0.1)

    v, patch = tiny.vision_width, tiny.patch
    kernel = (v, 3, 2, patch, patch)
    add(f"{vision}patch_embed.proj.weight", *kernel, scale=(6 * patch**2) ** -0.5)
    for i in range(tiny.vision_layers):
        layer = f"{vision}blocks.{i}."
        norm(f"{layer}norm1", v, bias=not tiny.new)
        norm(f"{layer}norm2", v, bias=not tiny.new)
        linear(f"{layer}attn.qkv", 3 * v, v)
        linear(f"{layer}attn.proj", v, v)
        if tiny.new:
            linear(f"{layer}mlp.gate_proj", tiny.vision_mlp, v)
            linear(f"{layer}mlp.up_proj", tiny.vision_mlp, v)
            linear(f"{layer}mlp.down_proj", v, tiny.vision_mlp)
        else:
            linear(f"{layer}mlp.fc1", 2 * v, v)
            linear(f"{layer}mlp.fc2", v, 2 * v)
    d = tiny.width
    norm(f"{vision}merger.ln_q", v, bias=not tiny.new)
    linear(f"{vision}merger.mlp.0", 4 * v, 4 * v)
    linear(f"{vision}merger.mlp.2", d, 4 * v)
    add(f"{text}embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"{text}layers.{i}."
        norm(f"{layer}input_layernorm", d)
        norm(f"{layer}post_attention_layernorm", d)
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{layer}self_attn.{part}", rows, d)
        add(f"{layer}self_attn.o_proj.weight", d, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm(f"{text}norm", d)
    if not tiny.tied:
        add("lm_head.weight", vocab, d, scale=5 * d**-0.5)
    return made
