"""The text tower of CLIP and SigLIP: token ids -> a row of length 1."""

from __future__ import annotations

import numpy as np

from edgevlm.export.checkpoint.computed import transposed
from edgevlm.export.checkpoint.layouts import OPEN_CLIP_FUSED, OPEN_CLIP_LAYERS, renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import encoder_layer, layer_norm, linear, unit
from edgevlm.export.parts import Net
from edgevlm.parts.text_tower import TextTower

# Far below any score, and within half precision's range.
_NEVER = -1e4


def _build(b: Builder, config: TextTower, ids: Value) -> Value:
    places = _places(b, ids)
    x = b.rows("embeddings", b.weight("embeddings.token_embedding.weight"), ids)
    table = b.weight("embeddings.position_embedding.weight")
    x = b.apply("Add", "embeddings", x, b.rows("positions", table, places))
    mask = _causal(b, places) if config.causal else None
    for i in range(config.num_hidden_layers):
        x = encoder_layer(b, f"encoder.layers.{i}", x, config, mask)
    x = b.picked("pooled", x, _pooled(b, config, ids))
    x = layer_norm(b, "final_layer_norm", x, config.layer_norm_eps)
    return unit(b, "row", linear(b, "projection", x))


def _places(b: Builder, ids: Value) -> Value:
    """0, 1, ... for the tokens of each text, int64 [n, tokens], without asking how many there are:
    a sum of ones.
    """
    zeros = b.apply("Mul", "places", ids, b.constant("int64 0", np.array(0)))
    ones = b.apply("Add", "places", zeros, b.constant("int64 1", np.array(1)))
    axis = b.constant("int64 axis", np.array(1))
    return b.node("CumSum", "places", [ones.name, axis.name], ids.shape, exclusive=1)


def _causal(b: Builder, places: Value) -> Value:
    """[n, 1, tokens, tokens]: _NEVER where the source stands behind the reader."""
    source, reader = b.wider("mask", places, 0), b.wider("mask", places, 1)
    later = b.cast("mask", b.apply("Greater", "mask", source, reader), "float32")
    return b.wider("mask", b.apply("Mul", "mask", later, b.number(_NEVER)), 0)


def _pooled(b: Builder, config: TextTower, ids: Value) -> Value:
    """The place of the token whose row is the text's, int64 [n, 1]; the first of several."""
    if config.pooled == "last":
        # Every text has all positions.
        return b.part("pooled", _places(b, ids), 0, config.tokens - 1, 1)
    if config.pooled == "end":
        end = b.constant("int64 end", np.array(config.end_id))
        ids = b.apply("Equal", "pooled", ids, end)
    # Some providers find the largest of int32 alone.
    ids = b.cast("pooled", ids, "int32")
    return b.node("ArgMax", "pooled", [ids.name], (1,), axis=1, keepdims=1)


NET = Net(_build, quantized=True)

# open_clip's names (transformer.py) -> transformers'.
_NAMES = {
    **OPEN_CLIP_LAYERS,
    r"token_embedding\.(.+)": r"embeddings.token_embedding.\1",
    r"positional_embedding": "embeddings.position_embedding.weight",
    r"ln_final\.(.+)": r"final_layer_norm.\1",
    r"text_projection\.(weight|bias)": r"projection.\1",
    r"head\.(weight|bias)": r"projection.\1",
}


def canonical(found: Weights, _: TextTower) -> Weights:
    """SigLIP's name of the projection; open_clip's layout: other names, queries, keys and values
    fused, and a projection that is no module the other way round.
    """
    out = renamed(found, _NAMES, OPEN_CLIP_FUSED)
    if matrix := out.pop("text_projection", None):
        out["projection.weight"] = transposed(matrix)
    return out
