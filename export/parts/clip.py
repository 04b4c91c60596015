"""CLIP's tower up to the layer whose output is read."""

from __future__ import annotations

from edgevlm.export.checkpoint.layouts import OPEN_CLIP_FUSED, OPEN_CLIP_LAYERS, renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import encoder_layer, layer_norm, patches, with_first
from edgevlm.export.parts import Net
from edgevlm.parts.clip import ClipTower


def _build(b: Builder, config: ClipTower, pixels: Value) -> Value:
    x = patches(b, "embeddings.patch_embedding", pixels, config.patch_size)
    x = with_first(b, x, "embeddings.class_embedding", "embeddings.position_embedding.weight")
    x = layer_norm(b, "pre_layrnorm", x, config.layer_norm_eps)
    for i in range(config.num_hidden_layers):
        x = encoder_layer(b, f"encoder.layers.{i}", x, config)
    return x if config.class_token else b.part("features", x, 0, 1, x.shape[0] - 1)


NET = Net(_build, quantized=True)

# open_clip's names (transformer.py) -> transformers'.
_NAMES = {
    **OPEN_CLIP_LAYERS,
    r"class_embedding": "embeddings.class_embedding",
    r"conv1\.weight": "embeddings.patch_embedding.weight",
    r"positional_embedding": "embeddings.position_embedding.weight",
    r"ln_pre\.(.+)": r"pre_layrnorm.\1",
}


def canonical(found: Weights, _: ClipTower) -> Weights:
    """open_clip's layout: other names, and queries, keys and values fused."""
    return renamed(found, _NAMES, OPEN_CLIP_FUSED)
