"""Gemma 2's decoder as a GGUF."""

from __future__ import annotations

import math

from gguf import GGUFWriter

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import GATED, Graph
from edgevlm.export.parts.gemma import NORM_OFFSET
from edgevlm.parts.gemma2 import Gemma2

# llama.cpp divides by the final cap and would assume 30 without the key. PaliGemma 2 was trained
# without one, and transformers applies none; at this value tanh(x / cap) * cap is x in float32.
_NO_SOFTCAP = 1e5


def _metadata(writer: GGUFWriter, config: Gemma2, _: Weights) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or _NO_SOFTCAP)
    writer.add_final_logit_softcapping(_NO_SOFTCAP)
    # PaliGemma's prefix has no window; llama.cpp would cut one longer than this.
    writer.add_sliding_window(config.max_position_embeddings)


def _gain(name: str, config: Gemma2) -> float:
    """Scores are scaled by query_pre_attn_scalar ** -0.5, in llama.cpp by head_dim ** -0.5. The two
    are equal in every published checkpoint.
    """
    if ".attn_q." not in name:
        return 1.0
    return math.sqrt(config.head_dim / config.query_pre_attn_scalar)


LAYER = {
    **GATED,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GRAPH = Graph(layer=LAYER, metadata=_metadata, gain=_gain, norm_offset=NORM_OFFSET)
