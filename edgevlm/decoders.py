"""Configs of LLaMA's kin, the decoders that several families share: LLaMA, Mistral, Phi-3, Qwen2.

Facts from transformers 4.57 (LlamaConfig, MistralConfig, Phi3Config, Qwen2Config) and InternLM2's
own code (configuration_internlm2.py), which is a LLaMA under other names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm import schema
from edgevlm.family import Config, Source, read_config, rope_parameters, setting
from edgevlm.parts.llama import Llama
from edgevlm.parts.phi3 import Phi3
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.parts.qwen2vl import Qwen2Vl

# Defaults, which a config.json omits; 0 where the class derives one number from others.
_DERIVED = ("num_key_value_heads", "head_dim")
_LLAMA = Llama(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=0,
    head_dim=0,
    vocab_size=32000,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
_MISTRAL = replace(
    _LLAMA, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072
)
_PHI3 = Phi3(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=0,
    head_dim=0,
    vocab_size=32064,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
_QWEN2 = Qwen2(
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=0,
    vocab_size=151936,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
_QWEN2_VL = Qwen2Vl(
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=0,
    vocab_size=152064,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
)
# The release of transformers from which on a file that has two tables keeps both.
_KEEPS_BOTH = 5
# The decoder by `model_type`, of config.json itself or of its text_config.
_DECODERS = {
    "palo": _LLAMA,
    "mobilevlm": _LLAMA,
    "llava": _LLAMA,
    "llava_llama": _LLAMA,
    "llama": _LLAMA,
    "internlm2": replace(_LLAMA, vocab_size=103168),
    "llava_mistral": _MISTRAL,
    "mistral": _MISTRAL,
    "llava_phi": _PHI3,
    "llava_phi3": _PHI3,
    "phi3": _PHI3,
    "qwen2": _QWEN2,
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
        _QWEN2_VL,
    ),
}
_WINDOWS = {"llava_mistral": 4096, "mistral": 4096}
# Each class's end token, where neither a config nor generation_config.json states one; of Qwen2,
# whose class has none, the one of its chats (<|im_end|>).
EOS = {"llama": 2, "phi3": 32000, "qwen2": 151645}
# "dynamic" stretches positions beyond max_position_embeddings only, where a bundle's context ends
# (transformers 4.57, modeling_rope_utils; InternLM2's own code).
_ROPES = ("default", "dynamic", "llama3")
# Phi-3's, by its later name and by its first.
_LONG = ("longrope", "su")
_LONG_KEYS = ("type", "rope_type", "rope_theta", "short_factor", "long_factor", "factor")
# llama.cpp's contexts are multiples of this.
_CONTEXT_STEP = 256
# What a decoder's config may say of no other value.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


def with_tables(text: Llama, source: Source, stated: Config) -> Llama:
    """The decoder of a checkpoint in transformers' layout, `stated` in its config.json, tied where
    transformers has one table for what is read and what is drawn.

    4.57 goes by the decoder's own config. 5.24 goes by the whole model's, where most classes say
    true if nobody did, and keeps the two tables of a file that has both.
    """
    config, key = source.files["config.json"], "tie_word_embeddings"
    own, whole = (setting(each, key, False) for each in (stated, config))
    if not any(name.endswith("lm_head.weight") for name in source.shapes):
        return replace(text, tie_word_embeddings=own or whole)
    saved_by, _, _ = str(config.get("transformers_version", "")).partition(".")
    newer = saved_by.isdecimal() and int(saved_by) >= _KEEPS_BOTH
    return replace(text, tie_word_embeddings=own and not newer)


def read(config: Config, model_type: str) -> Llama:
    """The decoder that `config` states, of `model_type` where it does not say itself.

    Raises ValueError for a kind that is not known and for what llama.cpp's graphs would compute
    otherwise.
    """
    name = setting(config, "model_type", model_type)
    if name not in _DECODERS:
        raise ValueError(f"text_config.model_type {name!r} is not one of {', '.join(_DECODERS)}")
    given = {k: v for k, v in config.items() if v is not None or k not in _DERIVED}
    text = read_config(_DECODERS[name], given)
    rope = rope_parameters(config)
    if isinstance(text, Qwen2Vl):
        text, rope = _with_sections(text, rope)
    long = isinstance(text, Phi3) and rope["rope_type"] in _LONG
    if rope["rope_type"] not in _ROPES and not long:
        raise ValueError(
            f"the decoder scales its positions ({rope['rope_type']!r}); only "
            f"{', '.join(_ROPES)} are known"
        )
    for key, known in _ONLY.items():
        if (value := setting({**config, **rope}, key, known)) != known:
            raise ValueError(f"{key} is {value!r}; only {known!r} is known")
    heads = text.num_attention_heads
    head_dim = text.head_dim or text.hidden_size // heads
    if isinstance(text, Phi3) and head_dim * heads != text.hidden_size:
        raise ValueError(f"head_dim is {head_dim}; Phi-3 divides hidden_size by its heads")
    if isinstance(text, Phi3) and long:
        text = _with_longrope(text, {**config, **rope}, rope, head_dim)
    theta = setting(rope, "rope_theta", text.rope_theta)
    factors: tuple[float, ...] = ()
    if rope["rope_type"] == "llama3":
        if text.architecture != "llama":
            raise ValueError("rope_type is 'llama3'; only a LLaMA's positions are scaled so")
        factors = _llama3(rope, head_dim, theta)
    # llama.cpp's graphs have no window: up to its length the answers are the same.
    longest, window = text.max_position_embeddings, _window(config, name, text)
    return replace(
        text,
        # Null, where Mistral's default is 8, says as many as queries.
        num_key_value_heads=config.get("num_key_value_heads", text.num_key_value_heads) or heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_factors=factors,
        max_position_embeddings=min(window, longest) if window else longest,
    )


def _with_longrope(text: Phi3, config: Config, rope: Mapping[str, Any], head_dim: int) -> Phi3:
    """A decoder with factors for short texts and for long ones (modeling_phi3_v.py,
    Phi3SuScaledRotaryEmbedding; transformers 4.57, _compute_longrope_parameters).
    """
    known = (*_LONG_KEYS, "original_max_position_embeddings")
    if odd := [key for key, value in rope.items() if key not in known and value is not None]:
        raise ValueError(f"rope_scaling has {odd[0]}; Phi-3's has a short_factor and a long_factor")
    short, long = (_factors(rope, key, head_dim // 2) for key in ("short_factor", "long_factor"))
    original = setting(config, "original_max_position_embeddings", 0)
    if original < 1 or original % _CONTEXT_STEP:
        raise ValueError(
            f"original_max_position_embeddings is {original}; only multiples of {_CONTEXT_STEP} "
            "are known"
        )
    scale = text.max_position_embeddings / original
    gain = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return replace(
        text, short_factors=short, long_factors=long, original_positions=original, rope_gain=gain
    )


def _factors(rope: Mapping[str, Any], key: str, n: int) -> tuple[float, ...]:
    found = rope.get(key)
    if not isinstance(found, list) or len(found) != n or not all(map(_is_factor, found)):
        raise ValueError(f"rope_scaling.{key} is not a list of {n} numbers above 0")
    return tuple(map(float, found))


def _is_factor(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and value > 0 and schema.finite(value)


def _with_sections(text: Qwen2Vl, rope: dict[str, Any]) -> tuple[Qwen2Vl, dict[str, Any]]:
    """A decoder with M-RoPE, and its positions under the name that they have in newer files."""
    sections = rope.get("mrope_section") or []
    heads = text.num_attention_heads
    half, odd = divmod(text.hidden_size, 2 * heads)
    known = isinstance(sections, list) and len(sections) == 3
    if not known or not all(type(s) is int and s > 0 for s in sections) or sum(sections) != half:
        raise ValueError(
            f"mrope_section is {sections!r}; only three numbers that add up to half of a head's "
            f"width, {half}, are known"
        )
    if odd or text.head_dim not in (0, 2 * half):
        raise ValueError(f"head_dim is {text.head_dim}; only hidden_size by heads is known")
    kind = rope["rope_type"]
    renamed = rope | {"rope_type": "default" if kind == "mrope" else kind}
    return replace(text, mrope_section=tuple(sections)), renamed


def _llama3(rope: Config, head_dim: int, theta: float) -> tuple[float, ...]:
    """LLaMA-3.1's factors: long waves are stretched, short ones are not, those between in part
    (transformers 4.57, modeling_rope_utils, _compute_llama3_parameters).
    """
    low, high, by = (
        setting(rope, key, 0.0) for key in ("low_freq_factor", "high_freq_factor", "factor")
    )
    original = setting(rope, "original_max_position_embeddings", 0)
    if not (0 < low < high and by >= 1 and original > 0):
        raise ValueError(
            f"rope_scaling is {dict(rope)}; LLaMA-3's needs low_freq_factor below "
            "high_freq_factor, a factor from 1 on and original_max_position_embeddings"
        )
    factors = []
    for pair in range(head_dim // 2):
        waves = original / (2 * math.pi * theta ** (2 * pair / head_dim))
        kept = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / by + kept))
    return tuple(factors)


def _window(config: Config, name: str, text: Llama) -> int | None:
    """The positions that a layer sees before it, itself included; None where all see all."""
    stated = config.get("sliding_window", _WINDOWS.get(name))
    if isinstance(text, Qwen2):
        layers: list[Any] = setting(config, "layer_types", []) if config.get("layer_types") else []
        if not layers and setting(config, "max_window_layers", 28) < text.num_hidden_layers:
            layers = ["sliding_attention"]
        if not setting(config, "use_sliding_window", False) or "sliding_attention" not in layers:
            return None
        stated = config.get("sliding_window", 4096)
    if stated is not None and (type(stated) is not int or stated < 1):
        raise ValueError(f"sliding_window is {stated!r}; only a number of positions is known")
    return stated
