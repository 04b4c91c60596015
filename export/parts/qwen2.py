"""Qwen2's decoder as a GGUF."""

from __future__ import annotations

from edgevlm.export.parts import GATED, Graph
from edgevlm.export.parts.llama import metadata

# llama.cpp turns the two halves of a head, as transformers does: nothing is permuted.
GRAPH = Graph(layer={**GATED, "ffn_norm": "post_attention_layernorm"}, metadata=metadata)
