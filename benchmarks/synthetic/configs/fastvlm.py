"""FastVLM."""

from __future__ import annotations

from typing import Any

# FastVLM-0.5B's config.json, as far as it is known.
FASTVLM: dict[str, Any] = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "image_aspect_ratio": "pad",
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "unfreeze_mm_vision_tower": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FASTVLM_TOKENS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
# Channels and blocks of the tower's stages, by the numbers of Apple's modules.
_STAGES = {0: (96, 2), 2: (192, 12), 4: (384, 24), 7: (768, 4), 10: (1536, 2)}
_ATTENDING = (7, 10)
_NETWORK = "model.vision_tower.vision_tower.model.network."
# Those of its tensors whose shapes say how large it is.
FASTVLM_TOWER: dict[str, tuple[int, ...]] = {
    **{
        f"{_NETWORK}{n}.{i}.convffn.fc1.weight": (4 * width, width, 1, 1)
        for n, (width, depth) in _STAGES.items()
        for i in (0, depth - 1)
    },
    **{
        f"{_NETWORK}{n}.0.token_mixer.qkv.weight": (3 * _STAGES[n][0], _STAGES[n][0])
        for n in _ATTENDING
    },
}
