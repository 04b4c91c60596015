"""Tiny random checkpoints of FastVLM, in Apple's layout and in transformers' 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.fastvit_tensors import as_timm, inference, training
from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.qwen2_vocabulary import Files, trained, write_qwen2
from tests.checkpoints.vocabulary import grown, write_json

SIZE, PATCH = 256, 64
# Image embeddings of a picture.
ROWS = (SIZE // PATCH) ** 2
# (tower, projector, decoder, output table).
_NAMES = {
    "own": ("model.vision_tower.vision_tower.model.", "model.mm_projector.{}", "model."),
    "hf": (
        "model.vision_tower.timm_model.",
        "model.multi_modal_projector.linear_{}",
        "model.language_model.",
    ),
}
# convert_fastvlm_weights_to_hf.py.
CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; mappings override keys of its files, None leaves a file out.

    `form` says whether the tower's convolutions are in branches, as for "training", or folded;
    `files` how the tokenizer is written, `image_token` whether it has <image>, which transformers'
    layout always does. `n_vocab` are the tables' rows, 0 a few more than tokens. `chat` is the chat
    template of transformers' layout.
    """

    layout: str = "own"
    form: str = "inference"
    files: Files = "pair"
    image_token: bool = False
    chat: str | None = CHAT
    tied: bool = True
    size: int = SIZE
    widths: tuple[int, ...] = (8, 16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 2, 1, 2, 1)
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    dtype: str = "float32"
    seed: int = 0
    shards: int = 1
    n_vocab: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] | None = field(default_factory=dict)
    nested: Mapping[str, Any] = field(default_factory=dict)


def write_fastvlm(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    own = tiny.layout == "own"
    added = ("<image>",)[: tiny.image_token or not own]
    tokens = write_qwen2(folder, added, tiny.files, grown(trained(), tiny.n_vocab))
    vocab = tiny.n_vocab or len(tokens) + 5  # Rows that no token has, as the published tables.
    ends = {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]}
    write_json(folder / "generation_config.json", ends)
    write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    config = _own(tiny, ends, vocab) if own else _hf(tiny, ends, tokens, vocab)
    write_json(folder / "config.json", config | dict(tiny.config))
    if own:
        return folder
    if tiny.processor is not None:
        pictures = _pictures(tiny) | dict(tiny.processor)
        nested = {
            "image_processor": pictures,
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": PATCH,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": None,
        }
        write_json(folder / "processor_config.json", nested | dict(tiny.nested))
    if tiny.chat is not None:
        (folder / "chat_template.jinja").write_text(tiny.chat, encoding="utf-8")
    return folder


def _own(tiny: Tiny, ends: Mapping[str, int], vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        **ends,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": tiny.width,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "mm_hidden_size": 2 * tiny.widths[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{tiny.size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tiny.tied,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.39.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def _hf(
    tiny: Tiny, ends: Mapping[str, int], tokens: Mapping[str, int], vocab: int
) -> dict[str, Any]:
    arguments = {
        "embed_dims": [*tiny.widths],
        "inference_mode": tiny.form == "inference",
        "layers": [*tiny.depths],
    }
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "dtype": tiny.dtype,
        "image_seq_length": ROWS,
        "image_token_index": tokens["<image>"],
        "model_type": "fast_vlm",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_dropout": 0.0,
            **ends,
            "hidden_act": "silu",
            "hidden_size": tiny.width,
            "intermediate_size": tiny.mlp,
            "layer_types": ["full_attention"] * tiny.layers,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": tiny.heads,
            "num_hidden_layers": tiny.layers,
            "num_key_value_heads": tiny.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": tiny.tied,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": vocab,
            **tiny.text_config,
        },
        "tie_word_embeddings": tiny.tied,
        "transformers_version": "5.24.0",
        "vision_config": {
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 2 * tiny.widths[-1],
            "initializer_range": 0.02,
            "model_args": arguments | dict(tiny.model_args),
            "model_type": "timm_wrapper",
            "num_classes": 2,
            **tiny.vision_config,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _pictures(tiny: Tiny) -> dict[str, Any]:
    return {
        "crop_size": {"height": tiny.size, "width": tiny.size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": tiny.size},
    }


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    tower, maps, decoder = _NAMES[tiny.layout]
    made = training(tiny.widths, tiny.depths, tiny.seed)
    made = inference(made) if tiny.form == "inference" else made
    made = as_timm(made) if tiny.layout == "hf" else made
    made = {f"{tower}{name}": tensor for name, tensor in made.items()}

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        made[name] = (rng.normal(size=shape) * spread).astype(np.float32)

    def norm(name: str) -> None:
        made[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=tiny.width)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0.1)

    d = tiny.width
    first, second = (maps.format(n) for n in ((0, 2) if tiny.layout == "own" else (1, 2)))
    linear(first, d, 2 * tiny.widths[-1])
    linear(second, d, d)
    add(f"{decoder}embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"{decoder}layers.{i}."
        norm(f"{layer}input_layernorm")
        norm(f"{layer}post_attention_layernorm")
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{layer}self_attn.{part}", rows, d)
        add(f"{layer}self_attn.o_proj.weight", d, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm(f"{decoder}norm")
    if not tiny.tied:
        add("lm_head.weight", vocab, d, scale=5 * d**-0.5)
    return made
