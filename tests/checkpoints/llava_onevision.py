"""Tiny random checkpoints of LLaVA-OneVision, in transformers' layouts and in LLaVA-NeXT's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.paligemma import Tensors, write_safetensors, write_weights
from tests.checkpoints.qwen2_vocabulary import Files, trained, write_qwen2
from tests.checkpoints.vocabulary import grown, write_json

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
    "own": ("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.",
            "model.image_newline", "model.", "lm_head.weight"),
}  # fmt: skip
# Expressions of the chat templates: what stands behind a role, for a picture, before the words of a
# text and at the end of a turn; the published one's, and that of transformers' conversion.
CHATS = {
    "onevision": ("' '", "'<image>'", "'\\n' + ", "'<|im_end|>'"),
    "chatml": ("'\\n'", "'<image>\\n'", "", "'<|im_end|>' + '\\n'"),
}
# LLaVA-NeXT's own layout, with heads as wide as So400m's.
OWN: Mapping[str, Any] = {"layout": "own", "vision_width": 144, "vision_heads": 2, "files": "pair"}


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; mappings override keys of its files, None leaves a file out.

    `n_vocab` are the tables' rows, 0 a few more than tokens; without `weights` whoever calls writes
    those of transformers' layouts. `chat` is the chat template by its name in CHATS, or its text.
    Of the own layout alone: `tower` says where that is ("inside", or in a "folder" beside the
    checkpoint, with a last layer that is not read), `files` how the tokenizer is written,
    `image_token` whether it has <image>.
    """

    layout: str = "hf"
    chat: str | None = None
    tower: str = "inside"
    files: Files = "json"
    image_token: bool = False
    size: int = SIZE
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
    n_vocab: int = 0
    weights: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] | None = field(default_factory=dict)
    nested: Mapping[str, Any] = field(default_factory=dict)


def write_onevision(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    own = tiny.layout == "own"
    added = ("<image>", "<video>")[: tiny.image_token if own else 2]
    tokens = write_qwen2(folder, added, tiny.files, grown(trained(), tiny.n_vocab))
    vocab = tiny.n_vocab or len(tokens) + 5  # Rows that no token has, as the published tables.
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"]},
    )
    if own:
        _write_own(folder, tiny, tokens, vocab, _tensors(tiny, vocab))
        return folder
    if tiny.weights:
        write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    write_json(folder / "config.json", _config(tiny, tokens, vocab))
    if tiny.chat:
        text = _chat_template(*CHATS[tiny.chat]) if tiny.chat in CHATS else tiny.chat
        write_json(folder / "chat_template.json", {"chat_template": text})
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
    return folder


def _chat_template(role: str, picture: str, words: str, end: str) -> str:
    def each(kind: str, shown: str) -> str:
        chosen = f"message['content'] | selectattr('type', 'equalto', '{kind}')"
        return f"{{% for content in {chosen} %}}{{{{ {shown} }}}}{{% endfor %}}"

    film = picture.replace("image", "video")
    turn = each("image", picture) + each("video", film) + each("text", f"{words}content['text']")
    return (
        f"{{% for message in messages %}}{{{{'<|im_start|>' + message['role'] + {role}}}}}{turn}"
        f"{{{{{end}}}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _write_own(
    folder: Path, tiny: Tiny, tokens: Mapping[str, int], vocab: int, made: Tensors
) -> None:
    """LLaVA-NeXT's own layout: no file of a picture processor, maybe no tower."""
    tower, vision = folder.with_name(folder.name + "-siglip"), _NAMES["own"][0]
    if tiny.tower == "folder":
        inside = {name: made.pop(name) for name in list(made) if name.startswith(vision)}
        _write_tower(tower, tiny, {n.removeprefix(vision): t for n, t in inside.items()})
    write_weights(folder, made, tiny.dtype, tiny.shards)
    name = str(tower) if tiny.tower == "folder" else "google/siglip-so400m-patch14-384"
    tuned = "" if tiny.tower == "folder" else "mm_vision_tower,"
    n = tiny.size
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaQwenForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": tokens["<|endoftext|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "hidden_act": "silu",
            "hidden_size": tiny.width,
            "image_aspect_ratio": f"anyres_max_{tiny.most}",
            "image_crop_resolution": None,
            "image_grid_pinpoints": [[n * a, n * b] for a in range(1, 4) for b in range(1, 4)],
            "image_split_resolution": None,
            "image_token_index": 151646,
            "intermediate_size": tiny.mlp,
            "max_position_embeddings": 8192,
            "max_window_layers": 24,
            "mm_hidden_size": tiny.vision_width,
            "mm_newline_position": "one_token",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_lr": None,
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_spatial_pool_mode": "bilinear",
            "mm_tunable_parts": f"{tuned}mm_mlp_adapter,mm_language_model",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": name,
            "mm_vision_tower_lr": 2e-06,
            "model_type": "llava_qwen",
            "num_attention_heads": tiny.heads,
            "num_hidden_layers": tiny.layers,
            "num_key_value_heads": tiny.kv_heads,
            "pos_skipping_range": 4096,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": tiny.tied,
            "tokenizer_model_max_length": 8192,
            "tokenizer_padding_side": "right",
            "torch_dtype": tiny.dtype,
            "use_cache": True,
            "use_mm_proj": True,
            "use_pos_skipping": False,
            "use_sliding_window": False,
            "vision_tower_pretrained": None,
            "vocab_size": vocab,
            **tiny.config,
        },
    )


def _write_tower(folder: Path, tiny: Tiny, vision: Tensors) -> None:
    """A SigLIP as it is published: with a text tower, the head and one layer more."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {
        "hidden_size": tiny.vision_width,
        "image_size": tiny.size,
        "intermediate_size": tiny.vision_mlp,
        "model_type": "siglip_vision_model",
        "num_attention_heads": tiny.vision_heads,
        "num_hidden_layers": tiny.vision_layers + 1,
        "patch_size": PATCH,
        **tiny.vision_config,
    }
    write_json(
        folder / "config.json",
        {"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": stated},
    )
    made = {f"vision_model.{name}": tensor for name, tensor in vision.items()}
    first, last = ".layers.0.", f".layers.{tiny.vision_layers}."
    made |= {n.replace(first, last): 1 - t for n, t in made.items() if first in n}
    made["vision_model.head.probe"] = np.zeros((1, 1, tiny.vision_width), np.float32)
    made["text_model.final_layer_norm.bias"] = np.zeros(4, np.float32)
    made |= {f"logit_{name}": np.zeros(1, np.float32) for name in ("scale", "bias")}
    write_safetensors(folder / "model.safetensors", made, "float32")


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
    add(f"{vision}embeddings.position_embedding.weight", (tiny.size // PATCH) ** 2, v)
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
    first, second = ("0", "2") if tiny.layout == "own" else ("linear_1", "linear_2")
    linear(f"{projector}{first}", d, v)
    linear(f"{projector}{second}", d, d)
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
