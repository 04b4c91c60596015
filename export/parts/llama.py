"""LLaMA's and Mistral's decoder as a GGUF, InternLM2's with them."""

from __future__ import annotations

import re

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.computed import rows
from edgevlm.export.checkpoint.tensors import Tensor, Weights
from edgevlm.export.parts import GATED, Graph
from edgevlm.parts.llama import Llama


def metadata(writer: GGUFWriter, config: Llama, _: Weights) -> None:
    """See Graph."""
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def extra(config: Llama) -> dict[str, NDArray[np.float32]]:
    """See Graph."""
    if not config.rope_factors:
        return {}
    return {"rope_freqs.weight": np.array(config.rope_factors, np.float32)}


GRAPH = Graph(
    layer={**GATED, "ffn_norm": "post_attention_layernorm"},
    metadata=metadata,
    extra=extra,
    permuted=True,
)

# InternLM2's names (modeling_internlm2.py) -> transformers'.
_INTERNLM2 = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"(layers\.\d+\.)(.+)\.weight")


def canonical(found: Weights, config: Llama) -> Weights:
    """InternLM2's layout: other names, and queries, keys and values fused group by group: of each
    head of keys the heads of queries that read it, the keys and the values.
    """
    if "tok_embeddings.weight" not in found:
        return found
    out: dict[str, Tensor] = {}
    for name, tensor in found.items():
        match = _LAYER.fullmatch(name)
        if match and match[2] == "attention.wqkv":
            out |= {f"{match[1]}self_attn.{k}": t for k, t in _apart(tensor, config).items()}
        elif match:
            out[f"{match[1]}{_INTERNLM2.get(match[2], match[2])}.weight"] = tensor
        else:
            out["embed_tokens.weight" if name == "tok_embeddings.weight" else name] = tensor
    return out


def _apart(fused: Tensor, config: Llama) -> dict[str, Tensor]:
    groups = config.num_key_value_heads
    each = config.num_attention_heads // groups
    axes = (groups, each + 2, config.head_dim)
    n = groups * (each + 2) * config.head_dim
    if fused.shape[0] != n:
        raise SourceError(
            f"{fused.file}: {fused.name} has {fused.shape[0]} rows, config.json says {n}"
        )
    return {
        "q_proj.weight": rows(fused, axes, 1, 0, each),
        "k_proj.weight": rows(fused, axes, 1, each),
        "v_proj.weight": rows(fused, axes, 1, each + 1),
    }
