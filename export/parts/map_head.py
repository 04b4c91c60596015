"""SigLIP's head: a probe that reads the features by attention, and a feed-forward net."""

from __future__ import annotations

from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import attention, layer_norm, linear, mlp
from edgevlm.export.parts import Net
from edgevlm.parts.map_head import MapHead

_ATTENTION = "head.attention"


def _build(b: Builder, config: MapHead, features: Value) -> Value:
    probe = b.weight("head.probe")
    # The same for every picture: its batch is one.
    q = linear(b, f"{_ATTENTION}.q_proj", Value(probe.name, probe.shape[1:]))
    k, v = (linear(b, f"{_ATTENTION}.{kind}_proj", features) for kind in "kv")
    x = attention(b, _ATTENTION, q, k, v, config.num_attention_heads)
    x = linear(b, f"{_ATTENTION}.out_proj", x)
    y = layer_norm(b, "head.layernorm", x, config.layer_norm_eps)
    x = b.apply("Add", "head", x, mlp(b, "head.mlp", y, config.hidden_act))
    return b.reshape("head", x, config.hidden_size)


NET = Net(_build, quantized=True)

# timm's names (layers/attention_pool.py) -> transformers', but for queries, keys and values, which
# both fuse.
_NAMES = {
    r"attn_pool\.latent": "head.probe",
    r"attn_pool\.q\.(.+)": rf"{_ATTENTION}.q_proj.\1",
    r"attn_pool\.proj\.(.+)": rf"{_ATTENTION}.out_proj.\1",
    r"attn_pool\.norm\.(.+)": r"head.layernorm.\1",
    r"attn_pool\.mlp\.(.+)": r"head.mlp.\1",
}
_FUSED = {
    r"head\.attention\.in_proj_(.+)": tuple(rf"{_ATTENTION}.{x}_proj.\1" for x in "qkv"),
    r"attn_pool\.kv\.(.+)": tuple(rf"{_ATTENTION}.{x}_proj.\1" for x in "kv"),
}


def canonical(found: Weights, _: MapHead) -> Weights:
    """transformers' layout and timm's."""
    return renamed(found, _NAMES, _FUSED)
