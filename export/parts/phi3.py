"""Phi-3's decoder as a GGUF."""

from __future__ import annotations

from edgevlm.export.parts import Graph
from edgevlm.export.parts.llama import metadata

GRAPH = Graph(
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    metadata=metadata,
)
