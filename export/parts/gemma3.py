"""Gemma 3's decoder as a GGUF."""

from __future__ import annotations

import math

from gguf import GGUFWriter, RopeScalingType

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import Graph
from edgevlm.export.parts.gemma import NORM_OFFSET
from edgevlm.export.parts.gemma2 import LAYER
from edgevlm.parts.gemma3 import Gemma3

# What llama.cpp assumes of a file that does not say: positions of layers with a window, and the
# layers that have none.
_LOCAL_BASE, _EVERY = 10000.0, 6
# llama.cpp scales the scores of a model of so many layers by (hidden_size / heads) ** -0.5, those
# of any other by head_dim ** -0.5.
_LAYERS_27B = 62


def _metadata(writer: GGUFWriter, config: Gemma3, _: Weights) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.everywhere != tuple((i + 1) % _EVERY == 0 for i in range(config.num_hidden_layers)):
        writer.add_sliding_window_pattern([not found for found in config.everywhere])
    if config.rope_local_base_freq != _LOCAL_BASE:
        writer.add_rope_freq_base_swa(config.rope_local_base_freq)
    if config.rope_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _gain(name: str, config: Gemma3) -> float:
    """Scores are scaled by query_pre_attn_scalar ** -0.5. Where llama.cpp's scale is another the
    norm of the queries makes up for it; in every published checkpoint it is the same.
    """
    if ".attn_q_norm." not in name:
        return 1.0
    large = config.num_hidden_layers == _LAYERS_27B
    square = config.hidden_size // config.num_attention_heads if large else config.head_dim
    return math.sqrt(square / config.query_pre_attn_scalar)


GRAPH = Graph(
    layer={**LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    metadata=_metadata,
    gain=_gain,
    norm_offset=NORM_OFFSET,
)
