"""Phi-3-Vision and Phi-3.5-Vision."""

from __future__ import annotations

from typing import Any

# Phi-3.5-Vision's config.json, as far as it is known, and preprocessor_config.json; the factors of
# its positions are not, and stand here as ones.
PHI3_V: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"],
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "eos_token_id": 2,
    "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3_v",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PHI3_V_PICTURES: dict[str, Any] = {"image_processor_type": "Phi3VImageProcessor", "num_crops": 4}
PHI3_V_TOKENS: dict[str, int] = {
    "<|endoftext|>": 32000,
    "<|assistant|>": 32001,
    "<|system|>": 32006,
    "<|end|>": 32007,
    "<|user|>": 32010,
    "<|image|>": 32044,
}
