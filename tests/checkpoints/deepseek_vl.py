"""Tiny random checkpoints of DeepSeek-VL's shape, in the original layout and in transformers'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.checkpoints.deepseek_vocabulary import BEGIN, END, IMAGE, write_deepseek
from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.vocabulary import write_json

# The original's code has heads of one number only.
SIZE, PATCH, HEADS = 64, 8, 16
TOKENS = (SIZE // PATCH) ** 2
HALF = [0.5, 0.5, 0.5]
# As published, of lists of items; the system's words are those of the original's code.
CHAT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
    "\n\n{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    f"{IMAGE}"
    "{% else %}{% set text = content['text'] %}"
    "{% if loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if loop.last %}{% set text = text.rstrip() %}{% endif %}{{ text }}{% endif %}{% endfor %}"
    "{{ '\n\n' if message['role'] == 'user' else '" + END + "' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
Layout = Literal["own", "hf", "hf-5"]
_TOWERS = {
    "hf": "model.vision_model.vision_model.",
    "hf-5": "model.vision_model.",
    "own": "vision_model.vision_tower.",
}


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; mappings override keys of its files, None leaves a file out.
    `head` says whether the pooling head is there that nobody runs.
    """

    layout: Layout = "own"
    head: bool = True
    tied: bool = False
    depth: int = 2
    vision_width: int = 64
    vision_layers: int = 2
    vision_mlp: int = 128
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 512
    dtype: str = "float32"
    seed: int = 0
    shards: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] | None = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


def write_deepseek_vl(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    own = tiny.layout == "own"
    more = {} if own else {"extra_special_tokens": {"image_token": IMAGE}, "image_token": IMAGE}
    tokens = write_deepseek(folder, **{**more, **tiny.tokenizer})
    vocab = len(tokens) + 5  # Rows that no token has, as the published tables.
    write_json(folder / "config.json", (_own if own else _hf)(tiny, tokens, vocab))
    if tiny.pictures is not None:
        pictures = _own_pictures() if own else _hf_pictures()
        write_json(folder / "preprocessor_config.json", pictures | dict(tiny.pictures))
    processor: dict[str, Any] = {"num_image_tokens": TOKENS, "processor_class": "VLChatProcessor"}
    if own:
        processor |= {"add_special_token": False, "ignore_id": -100, "image_tag": IMAGE}
        processor |= {"mask_prompt": True, "sft_format": "deepseek"}
    else:
        processor["processor_class"] = "DeepseekVLProcessor"
        _write_begin(folder / "tokenizer.json", tokens)
        (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
        ids = {"bos_token_id": tokens[BEGIN], "eos_token_id": tokens[END]}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "processor_config.json", processor | dict(tiny.processor))
    write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


def _write_begin(path: Path, tokens: Mapping[str, int]) -> None:
    """Lets tokenizer.json put the begin token first, as transformers saves it."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    known = {BEGIN: {"id": BEGIN, "ids": [tokens[BEGIN]], "tokens": [BEGIN]}}
    process = {"type": "TemplateProcessing", "single": [begin, text], "special_tokens": known}
    process["pair"] = [begin, text, begin, {"Sequence": {"id": "B", "type_id": 1}}]
    data = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, data | {"post_processor": process})


def _text(tiny: Tiny, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "torch_dtype": tiny.dtype,
        "vocab_size": vocab,
        **({"tie_word_embeddings": True} if tiny.tied else {}),
        **tiny.text_config,
    }


def _own(tiny: Tiny, _: Mapping[str, int], vocab: int) -> dict[str, Any]:
    return {
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": tiny.depth,
                "input_dim": tiny.vision_width,
                "n_embed": tiny.width,
                "projector_type": "mlp_gelu",
            },
        },
        "language_config": _text(tiny, vocab),
        "model_type": "multi_modality",
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.38.2",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": SIZE,
                "model_name": "siglip_large_patch16_384",
                "pixel_mean": HALF,
                "pixel_std": HALF,
                "select_feature": "same",
                "select_layer": -1,
                **tiny.vision_config,
            },
        },
        **tiny.config,
    }


def _hf(tiny: Tiny, tokens: Mapping[str, int], vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekVLForConditionalGeneration"],
        "image_token_id": tokens[IMAGE],
        "model_type": "deepseek_vl",
        "pad_token_id": tokens[END],
        "text_config": {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, **_text(tiny, vocab)},
        "torch_dtype": tiny.dtype,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": tiny.vision_width,
            "image_size": SIZE,
            "intermediate_size": tiny.vision_mlp,
            "model_type": "siglip_vision_model",
            "num_attention_heads": HEADS,
            "num_hidden_layers": tiny.vision_layers,
            "patch_size": PATCH,
            **({} if tiny.head else {"vision_use_head": False}),
            **tiny.vision_config,
        },
        **tiny.config,
    }


def _own_pictures() -> dict[str, Any]:
    """The published file, which leaves it to the tower to normalise."""
    return {
        "background_color": [127, 127, 127],
        "do_normalize": False,
        "image_mean": HALF,
        "image_processor_type": "VLMImageProcessor",
        "image_size": SIZE,
        "image_std": HALF,
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 0.00392156862745098,
    }


def _hf_pictures() -> dict[str, Any]:
    return {
        "background_color": [127, 127, 127],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_processor_type": "DeepseekVLImageProcessor",
        "image_std": HALF,
        "min_size": 14,
        "processor_class": "DeepseekVLProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    own = tiny.layout == "own"
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

    v, mlp, tower = tiny.vision_width, tiny.vision_mlp, _TOWERS[tiny.layout]
    patch = f"{tower}{'patch_embed.proj' if own else 'embeddings.patch_embedding'}"
    add(f"{patch}.weight", v, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5)
    add(f"{patch}.bias", v, scale=0.1)
    if own:
        add(f"{tower}pos_embed", 1, TOKENS, v)
    else:
        add(f"{tower}embeddings.position_embedding.weight", TOKENS, v)
    for i in range(tiny.vision_layers):
        layer = f"{tower}{'blocks' if own else 'encoder.layers'}.{i}."
        for n in "12":
            norm(f"{layer}{'norm' if own else 'layer_norm'}{n}", v)
        if own:
            linear(f"{layer}attn.qkv", 3 * v, v)
        for x in "qkv" if not own else "":
            linear(f"{layer}self_attn.{x}_proj", v, v)
        linear(f"{layer}{'attn.proj' if own else 'self_attn.out_proj'}", v, v)
        linear(f"{layer}mlp.fc1", mlp, v)
        linear(f"{layer}mlp.fc2", v, mlp)
    norm(f"{tower}{'norm' if own else 'post_layernorm'}", v)
    if tiny.head:
        pool = f"{tower}{'attn_pool' if own else 'head'}."
        add(f"{pool}{'latent' if own else 'probe'}", 1, 1, v)
        if own:
            linear(f"{pool}q", v, v)
            linear(f"{pool}kv", 2 * v, v)
        else:
            add(f"{pool}attention.in_proj_weight", 3 * v, v)
            add(f"{pool}attention.in_proj_bias", 3 * v)
        linear(f"{pool}{'proj' if own else 'attention.out_proj'}", v, v)
        norm(f"{pool}{'norm' if own else 'layernorm'}", v)
        linear(f"{pool}mlp.fc1", mlp, v)
        linear(f"{pool}mlp.fc2", v, mlp)
    d = tiny.width
    for i in range(tiny.depth):
        name = f"aligner.layers.{2 * i}" if own else f"model.aligner.linear{i + 1}"
        linear(name, d, d if i else v)
    decoder = "language_model.model." if own else "model.language_model."
    add(f"{decoder}embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"{decoder}layers.{i}."
        norm(f"{layer}input_layernorm", d, bias=False)
        norm(f"{layer}post_attention_layernorm", d, bias=False)
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            add(f"{layer}self_attn.{part}.weight", rows, d)
        add(f"{layer}mlp.gate_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.up_proj.weight", tiny.mlp, d)
        add(f"{layer}mlp.down_proj.weight", d, tiny.mlp)
    norm(f"{decoder}norm", d, bias=False)
    if not tiny.tied:
        add(
            "language_model.lm_head.weight" if own else "lm_head.weight",
            vocab,
            d,
            scale=5 * d**-0.5,
        )
    return made
