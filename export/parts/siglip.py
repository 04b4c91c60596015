"""SigLIP's tower: every patch after the last norm or without it."""

from __future__ import annotations

import math

from edgevlm.export.checkpoint.computed import reshaped
from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import encoder_layer, layer_norm
from edgevlm.export.onnx.layers import patches as patch_rows
from edgevlm.export.parts import Net
from edgevlm.parts.siglip import SiglipTower


def _build(b: Builder, config: SiglipTower, pixels: Value) -> Value:
    x = patch_rows(b, "embeddings.patch_embedding", pixels, config.patch_size)
    x = b.apply("Add", "embeddings", x, b.weight("embeddings.position_embedding.weight"))
    for i in range(config.num_hidden_layers):
        x = encoder_layer(b, f"encoder.layers.{i}", x, config)
    return layer_norm(b, "post_layernorm", x, config.layer_norm_eps) if config.final_norm else x


NET = Net(_build, quantized=True)

# timm's names (vision_transformer.py) -> transformers'.
_POSITIONS = "embeddings.position_embedding.weight"
_PATCHES = "embeddings.patch_embedding.weight"
_NAMES = {
    r"pos_embed": _POSITIONS,
    r"patch_embed\.proj\.(.+)": r"embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm([12])\.(.+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(.+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.(.+)": r"encoder.layers.\1.mlp.\2",
    r"norm\.(.+)": r"post_layernorm.\1",
}
_FUSED = {
    r"blocks\.(\d+)\.attn\.qkv\.(.+)": tuple(
        rf"encoder.layers.\1.self_attn.{x}_proj.\2" for x in "qkv"
    )
}


def canonical(found: Weights, config: SiglipTower) -> Weights:
    """timm's layout: other names, queries, keys and values fused, positions of a batch of one;
    Moondream2's patches are rows of channels, each with its lines.
    """
    out = renamed(found, _NAMES, _FUSED)
    stored = out.get(_POSITIONS)
    if stored and len(stored.shape) == 3 and stored.shape[0] == 1:
        out[_POSITIONS] = reshaped(stored, stored.shape[1:])
    patches, (_, *sides) = out.get(_PATCHES), config.tensors()[_PATCHES]
    if patches and len(patches.shape) == 2 and patches.shape[1] == math.prod(sides):
        out[_PATCHES] = reshaped(patches, (patches.shape[0], *sides))
    return out
