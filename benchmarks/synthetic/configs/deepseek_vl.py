"""DeepSeek-VL 1.3B."""

from __future__ import annotations

from typing import Any

# DeepSeek-VL-1.3B-chat's config.json in the original layout, its preprocessor_config.json and
# tokens.
DEEPSEEK_VL: dict[str, Any] = {
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {
            "depth": 2,
            "input_dim": 1024,
            "n_embed": 2048,
            "projector_type": "mlp_gelu",
        },
    },
    "language_config": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "torch_dtype": "float16",
        "vocab_size": 102400,
    },
    "model_type": "multi_modality",
    "torch_dtype": "float16",
    "vision_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "pixel_mean": [0.5, 0.5, 0.5],
            "pixel_std": [0.5, 0.5, 0.5],
            "select_feature": "same",
            "select_layer": -1,
        },
    },
}
DEEPSEEK_VL_PICTURES: dict[str, Any] = {
    "background_color": [127, 127, 127],
    "do_normalize": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "VLMImageProcessor",
    "image_size": 384,
    "image_std": [0.5, 0.5, 0.5],
    "min_size": 14,
    "processor_class": "VLChatProcessor",
    "rescale_factor": 0.00392156862745098,
}
DEEPSEEK_VL_TOKENS: dict[str, int] = {
    "<\uff5cend\u2581of\u2581sentence\uff5c>": 100001,
    "<image_placeholder>": 100015,
}
