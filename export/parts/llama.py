"""LLaMA's and Mistral's decoder as a GGUF."""

from __future__ import annotations

from gguf import GGUFWriter

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import GATED, Graph
from edgevlm.parts.llama import Llama


def metadata(writer: GGUFWriter, config: Llama, _: Weights) -> None:
    """See Graph."""
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


GRAPH = Graph(
    layer={**GATED, "ffn_norm": "post_attention_layernorm"}, metadata=metadata, permuted=True
)
