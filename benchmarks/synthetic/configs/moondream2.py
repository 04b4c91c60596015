"""Moondream2."""

from __future__ import annotations

from typing import Any

# The sizes that moondream's code has (moondream/torch/config.py at 44146f1), as its config.json may
# state them, and the tokens of starmie-v1 that a prompt needs.
MOONDREAM2: dict[str, Any] = {
    "architectures": ["HfMoondream"],
    "config": {
        "region": {
            "coord_feat_dim": 256,
            "coord_out_dim": 1024,
            "dim": 2048,
            "inner_dim": 8192,
            "size_feat_dim": 512,
            "size_out_dim": 2048,
        },
        "text": {
            "dim": 2048,
            "ff_dim": 8192,
            "max_context": 2048,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 24,
            "vocab_size": 51200,
        },
        "vision": {
            "crop_size": 378,
            "enc_dim": 1152,
            "enc_ff_dim": 4304,
            "enc_n_heads": 16,
            "enc_n_layers": 27,
            "enc_patch_size": 14,
            "max_crops": 12,
            "overlap_margin": 4,
            "proj_inner_dim": 8192,
            "proj_out_dim": 2048,
        },
    },
    "model_type": "moondream1",
}
MOONDREAM2_TOKENS: dict[str, int] = {
    "<|endoftext|>": 0,
    "<|md_reserved_0|>": 1,
    "<|md_reserved_1|>": 2,
    "<|md_reserved_2|>": 3,
}
