"""Configs of LLaMA's kin, the decoders that several families share: LLaMA, Mistral, Phi-3.

Facts from transformers 4.57 (LlamaConfig, MistralConfig, Phi3Config).
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm.family import Config, read_config, rope_parameters, setting
from edgevlm.parts.llama import Llama
from edgevlm.parts.phi3 import Phi3

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
# The decoder by `model_type`, of config.json itself or of its text_config.
_DECODERS = {
    "palo": _LLAMA,
    "mobilevlm": _LLAMA,
    "llava": _LLAMA,
    "llava_llama": _LLAMA,
    "llama": _LLAMA,
    "llava_mistral": _MISTRAL,
    "mistral": _MISTRAL,
    "llava_phi": _PHI3,
    "llava_phi3": _PHI3,
    "phi3": _PHI3,
}
_WINDOWS = {"llava_mistral": 4096, "mistral": 4096}
# Each class's end token, where neither a config nor generation_config.json states one.
EOS = {"llama": 2, "phi3": 32000}
# What a decoder's config may say of no other value.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


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
    if rope["rope_type"] != "default":
        raise ValueError(
            f"the decoder scales its positions ({rope['rope_type']!r}); only 'default' is known"
        )
    for key, known in _ONLY.items():
        if (value := setting({**config, **rope}, key, known)) != known:
            raise ValueError(f"{key} is {value!r}; only {known!r} is known")
    heads = text.num_attention_heads
    head_dim = text.head_dim or text.hidden_size // heads
    if isinstance(text, Phi3) and head_dim * heads != text.hidden_size:
        raise ValueError(f"head_dim is {head_dim}; Phi-3 divides hidden_size by its heads")
    # llama.cpp's graphs have no window: up to its length the answers are the same.
    longest, window = text.max_position_embeddings, config.get("sliding_window", _WINDOWS.get(name))
    return replace(
        text,
        # Null, where Mistral's default is 8, says as many as queries.
        num_key_value_heads=config.get("num_key_value_heads", text.num_key_value_heads) or heads,
        head_dim=head_dim,
        rope_theta=setting(rope, "rope_theta", text.rope_theta),
        max_position_embeddings=min(window, longest) if window else longest,
    )
