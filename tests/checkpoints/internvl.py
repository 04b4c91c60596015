"""Tiny random checkpoints of InternVL's shape, in both published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.qwen2_vocabulary import Files, write_qwen2
from tests.checkpoints.vocabulary import write_json

Layout = Literal["own", "hf", "hf-old"]
# As the published tokenizers have them, behind Qwen2's own.
ADDED = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{'<|im_start|>system\n"
    "You are a café helper.<|im_end|>\n'}}{% endif %}" + CHAT_TEMPLATE
)
# As a model's own copy of the original's file, with other words and a comment that holds some.
CONVERSATION = """
import dataclasses


register_conv_template(
    Conversation(
        name='Hermes-2',
        system_template='<|im_start|>system\\n{system_message}',
        roles=('<|im_start|>user\\n', '<|im_start|>assistant\\n'),
        sep_style=SeparatorStyle.MPT,
        sep='<|im_end|>',
        stop_str='<|endoftext|>',
    )
)
register_conv_template(
    Conversation(
        name='internvl2_5',
        system_template='<|im_start|>system\\n{system_message}',
        # system_message='Not these.',
        system_message='You are a café guide.',
        roles=('<|im_start|>user\\n', '<|im_start|>assistant\\n'),
        sep_style=SeparatorStyle.MPT,
        sep='<|im_end|>\\n',
    )
)
"""
DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; `processor` overrides keys of preprocessor_config.json, `chat` is
    its chat template, `conversation` its conversation.py. "hf-old" has the names of transformers
    before 4.52.
    """

    layout: Layout = "hf"
    files: Files = "json"
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
    chat: str | None = CHAT_TEMPLATE
    conversation: str = ""
    processor: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Image embeddings of a tile."""
        return (self.size // self.patch // self.factor) ** 2


def write_internvl(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "start_image_token": "<img>",
        "video_token": "<video>",
    }
    more: dict[str, Any] = {} if tiny.layout == "own" else {**named, "extra_special_tokens": named}
    added = ADDED if tiny.layout == "own" else (*ADDED, "<video>")
    tokens = write_qwen2(folder, added, tiny.files, **more)
    vocab = len(tokens) + 3  # Rows that no token has, as the published tables.
    write_json(folder / "config.json", _config(tiny, tokens, vocab))
    if tiny.layout != "own":
        _write_processor(folder, tiny)
    if tiny.conversation:
        (folder / "conversation.py").write_text(tiny.conversation, encoding="utf-8")
    write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny, tokens: Mapping[str, int], vocab: int) -> dict[str, Any]:
    text = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "eos_token_id": tokens["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 8192,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": DYNAMIC,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": tiny.tied,
        "torch_dtype": tiny.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
        **tiny.text_config,
    }
    vision = {
        "hidden_act": "gelu",
        "hidden_size": tiny.vision_width,
        "intermediate_size": tiny.vision_mlp,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": tiny.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": tiny.vision_layers,
    }
    if tiny.layout == "own":
        return {
            "architectures": ["InternVLChatModel"],
            "downsample_ratio": 1 / tiny.factor,
            "dynamic_image_size": True,
            "force_image_size": tiny.size,
            "llm_config": text,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "model_type": "internvl_chat",
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "torch_dtype": tiny.dtype,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": True,
            "vision_config": {
                **vision,
                "drop_path_rate": 0.1,
                "image_size": tiny.size,
                "model_type": "intern_vit_6b",
                "patch_size": tiny.patch,
                "qk_normalization": False,
                "qkv_bias": tiny.bias,
                "use_flash_attn": True,
                **tiny.vision_config,
            },
            **tiny.config,
        }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / tiny.factor,
        "image_seq_length": tiny.rows,
        "image_token_id": tokens["<IMG_CONTEXT>"],
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": tiny.dtype,
        "vision_config": {
            **vision,
            "attention_bias": tiny.bias,
            "image_size": [tiny.size, tiny.size],
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "patch_size": [tiny.patch, tiny.patch],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
            **tiny.vision_config,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        **tiny.config,
    }


def _write_processor(folder: Path, tiny: Tiny) -> None:
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": None,
            "crop_to_patches": False,
            "data_format": "channels_first",
            "default_to_square": True,
            "device": None,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "input_data_format": None,
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "return_tensors": None,
            "size": {"height": tiny.size, "width": tiny.size},
            **tiny.processor,
        },
    )
    processor = {"image_seq_length": tiny.rows, "processor_class": "InternVLProcessor"}
    write_json(folder / "processor_config.json", processor)
    if tiny.chat:
        (folder / "chat_template.jinja").write_text(tiny.chat, encoding="utf-8")


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
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
        add(f"{layer}self_attn.o_proj.weight", d, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm("norm", d, bias=False)
    if not tiny.tied:
        add("lm_head.weight", vocab, d, scale=5 * d**-0.5)
    rename = _own_name if tiny.layout == "own" else _hf_name
    named: Tensors = {}
    for name, values in made.items():
        if ".qkv." in name and tiny.layout != "own":
            for part, rows_of in zip("qkv", np.split(values, 3), strict=True):
                target = name.replace("attn.qkv", f"attention.{part}_proj")
                named[_hf_name(target, tiny.layout)] = np.ascontiguousarray(rows_of)
        else:
            named[rename(name, tiny.layout)] = values
    return named


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
