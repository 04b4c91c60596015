"""Phi-3's decoder as a GGUF."""

from __future__ import annotations

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import Graph
from edgevlm.export.parts.llama import metadata
from edgevlm.parts import EMBED
from edgevlm.parts.phi3 import Phi3

# Phi-3-Vision's other name of the table.
_WTE = "wte.weight"


def _metadata(writer: GGUFWriter, config: Phi3, tensors: Weights) -> None:
    metadata(writer, config, tensors)
    if config.long_factors:
        writer.add_rope_scaling_orig_ctx_len(config.original_positions)
        writer.add_rope_scaling_attn_factors(config.rope_gain)


def _extra(config: Phi3) -> dict[str, NDArray[np.float32]]:
    """llama.cpp takes the long ones for contexts of more positions than the original has."""
    if not config.long_factors:
        return {}
    return {
        "rope_factors_long.weight": np.array(config.long_factors, np.float32),
        "rope_factors_short.weight": np.array(config.short_factors, np.float32),
    }


def canonical(found: Weights, _: Phi3) -> Weights:
    """One table of token embeddings where it is there under two names, or under the other one."""
    rest = {name: tensor for name, tensor in found.items() if name != _WTE}
    return {EMBED: found[_WTE], **rest} if _WTE in found else rest


GRAPH = Graph(
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    metadata=_metadata,
    extra=_extra,
)
