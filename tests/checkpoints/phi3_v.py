"""Tiny random checkpoints of Phi-3-Vision, as Phi-3.5-Vision is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.llava import MEAN, STD, Tiny
from tests.checkpoints.llava_tensors import tensors
from tests.checkpoints.llava_tokenizers import PHI3, Tokens
from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.vocabulary import write_json

SIZE, CROPS, ORIGINAL = 32, 4, 512
EMBED = "model.vision_embed_tokens."
PLACEHOLDER = "<|image|>"
_CHAT = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != "
    "'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)
_CODE = "processing_phi3_v.Phi3V"


def write_phi3_v(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    spaces: str = "every",
    tables: str = "embed_tokens",
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 3,
    **options: Any,
) -> Path:
    """Writes a checkpoint; `config` and `processor` override keys of config.json and
    preprocessor_config.json, `options` are llava.Tiny's.

    spaces: before which text its tokenizer puts one, "every" or the "first". tables: the table of
    token embeddings is "embed_tokens", the picture's "wte" or there twice, "both".
    """
    given = {"size": SIZE, "seed": seed, **options}
    tiny = Tiny(vocabulary="phi3", projector="linear", **given)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**_config(tiny), **(config or {})})
    ends: dict[str, Any] = {"_from_model_config": True, "bos_token_id": 1}
    ends["eos_token_id"] = [_id(tiny, t) for t in ("<|end|>", "<|assistant|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", ends)
    stated = {
        "auto_map": {
            "AutoImageProcessor": f"{_CODE}ImageProcessor",
            "AutoProcessor": f"{_CODE}Processor",
        },
        "image_mean": MEAN,
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": STD,
        "num_crops": CROPS,
        "num_img_tokens": 144,
        "processor_class": "Phi3VProcessor",
        "transformers_version": "4.38.1",
        **(processor or {}),
    }
    write_json(folder / "preprocessor_config.json", stated)
    _write_tokenizer(folder, tiny, spaces)
    write_weights(folder, _tensors(tiny, tables), dtype, shards)
    return folder


def factors(tiny: Tiny, seed: int, most: float) -> list[float]:
    """Growing factors, one for each pair of a head's dimensions."""
    n = tiny.width // tiny.heads // 2
    grown = np.sort(np.random.default_rng(seed).uniform(1, most, n))
    return [round(float(x), 4) for x in grown]


def _config(tiny: Tiny) -> dict[str, Any]:
    return {
        "_name_or_path": "Phi-3.5-vision-instruct",
        "architectures": ["Phi3VForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": tiny.width,
        "img_processor": {
            "image_dim_out": tiny.vision_width,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
        "initializer_range": 0.02,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 8 * ORIGINAL,
        "model_type": "phi3_v",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "original_max_position_embeddings": ORIGINAL,
        "pad_token_id": _first(tiny),
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": factors(tiny, 1, 60.0),
            "short_factor": factors(tiny, 2, 3.0),
            "type": "su",
        },
        "rope_theta": 10000.0,
        "sliding_window": 64 * ORIGINAL,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.1",
        "use_cache": True,
        "vocab_size": tiny.n_vocab,
        "_attn_implementation": "flash_attention_2",
    }


def _first(tiny: Tiny) -> int:
    """The id of the first of Phi-3's own tokens."""
    return int(tiny.tokens.ids["eos_token_id"])


def _id(tiny: Tiny, text: str) -> int:
    return _first(tiny) + PHI3.index(text)


def _write_tokenizer(folder: Path, tiny: Tiny, spaces: str) -> None:
    """LlamaTokenizerFast's files, and none of SentencePiece."""
    from transformers import AutoTokenizer

    Tokens("phi3", own=True).write(folder)
    path = folder / "tokenizer_config.json"
    stated = json.loads(path.read_text("utf-8"))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    image = {"content": PLACEHOLDER, **plain, "special": True}
    stated["added_tokens_decoder"][str(_first(tiny) + len(PHI3))] = image
    stated |= {"chat_template": _CHAT, "legacy": spaces == "every"}
    write_json(path, stated)
    untyped: Any = AutoTokenizer
    untyped.from_pretrained(folder, use_fast=True).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    saved = json.loads(path.read_text("utf-8")) | {"chat_template": _CHAT, "legacy": False}
    write_json(path, saved)


def _tensors(tiny: Tiny, tables: str) -> Tensors:
    """LLaVA's random ones under Phi-3-Vision's names, with a connector of its own."""
    rng = np.random.default_rng(tiny.seed + 1)

    def normal(*shape: int, std: float) -> Any:
        return (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    old, out = "model.vision_tower.vision_tower.", Tensors()
    for name, tensor in tensors(tiny).items():
        if name.startswith(old):
            out[f"{EMBED}img_processor.{name.removeprefix(old)}"] = tensor
        elif not name.startswith("model.mm_projector."):
            out[name] = tensor
    merged, width = 4 * tiny.vision_width, tiny.width
    out |= {
        f"{EMBED}glb_GN": normal(1, 1, merged, std=1.0),
        f"{EMBED}sub_GN": normal(1, 1, 1, merged, std=1.0),
        f"{EMBED}img_projection.0.weight": normal(width, merged, std=merged**-0.5),
        f"{EMBED}img_projection.0.bias": normal(width, std=0.1),
        f"{EMBED}img_projection.2.weight": normal(width, width, std=1.5 * width**-0.5),
        f"{EMBED}img_projection.2.bias": normal(width, std=0.1),
    }
    table = out["model.embed_tokens.weight"]
    if tables != "embed_tokens":
        out[f"{EMBED}wte.weight"] = table
    if tables == "wte":
        del out["model.embed_tokens.weight"]
    return out
