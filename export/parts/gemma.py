"""Gemma's decoder as a GGUF."""

from __future__ import annotations

from edgevlm.export.parts import GATED, Graph

# Its norms scale by 1 + weight; llama.cpp's by the weight.
NORM_OFFSET = 1.0

GRAPH = Graph(layer={**GATED, "ffn_norm": "post_attention_layernorm"}, norm_offset=NORM_OFFSET)
