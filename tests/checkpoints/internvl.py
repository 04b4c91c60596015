"""Tiny random checkpoints of InternVL's shape, in both published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints.internlm2_vocabulary import write_internlm2, write_internlm2_as_llama
from tests.checkpoints.internvl_tensors import Tiny, tensors
from tests.checkpoints.paligemma import write_weights
from tests.checkpoints.qwen2_vocabulary import trained, write_qwen2
from tests.checkpoints.vocabulary import grown, write_json

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
    if tiny.internlm2 and tiny.layout != "own":
        tokens = write_internlm2_as_llama(folder, added, **more)
    elif tiny.internlm2:
        tokens = write_internlm2(folder, added)
    else:
        tokens = write_qwen2(folder, added, tiny.files, grown(trained(), tiny.n_vocab), **more)
    vocab = tiny.n_vocab or len(tokens) + 3  # Rows that no token has, as the published tables.
    write_json(folder / "config.json", _config(tiny, tokens, vocab))
    if tiny.layout != "own":
        _write_processor(folder, tiny)
    if tiny.conversation:
        (folder / "conversation.py").write_text(tiny.conversation, encoding="utf-8")
    if tiny.weights:
        write_weights(folder, tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny, tokens: Mapping[str, int], vocab: int) -> dict[str, Any]:
    text: dict[str, Any] = {
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
    }
    if tiny.internlm2 and tiny.layout != "own":
        text |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "model_type": "llama"}
    elif tiny.internlm2:
        text |= {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "eos_token_id": 2,
            "model_type": "internlm2",
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        }
    text |= tiny.text_config
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
    if tiny.chat is not None:
        template = tiny.chat or CHAT_TEMPLATE
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
