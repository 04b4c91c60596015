"""InternViT-300M, positions as they are stored."""

from __future__ import annotations

from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import attention, layer_norm, linear, mlp, patches, with_first
from edgevlm.export.parts import Net
from edgevlm.parts.internvit import InternVit


def _build(b: Builder, config: InternVit, pixels: Value) -> Value:
    x = patches(b, "embeddings.patch_embeddings.projection", pixels, config.patch_size)
    x = with_first(b, x, "embeddings.cls_token", "embeddings.position_embeddings")
    for i in range(config.num_hidden_layers):
        x = _layer(b, f"encoder.layer.{i}", x, config)
    return b.part("features", x, 0, 1, x.shape[0] - 1)


def _layer(b: Builder, name: str, x: Value, config: InternVit) -> Value:
    y = layer_norm(b, f"{name}.layernorm_before", x, config.layer_norm_eps)
    q, k, v = (linear(b, f"{name}.attention.{kind}_proj", y) for kind in "qkv")
    y = attention(b, f"{name}.attention", q, k, v, config.num_attention_heads)
    y = linear(b, f"{name}.attention.projection_layer", y)
    x = b.apply("Add", name, x, b.apply("Mul", name, y, b.weight(f"{name}.lambda_1")))
    y = layer_norm(b, f"{name}.layernorm_after", x, config.layer_norm_eps)
    y = mlp(b, f"{name}.mlp", y, config.hidden_act)
    return b.apply("Add", name, x, b.apply("Mul", name, y, b.weight(f"{name}.lambda_2")))


NET = Net(_build, quantized=True)

# InternVL's own names (modeling_intern_vit.py) -> transformers'.
_NAMES = {
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.position_embedding": "embeddings.position_embeddings",
    r"embeddings\.patch_embedding\.(.+)": r"embeddings.patch_embeddings.projection.\1",
    r"encoder\.layers\.(\d+)\.norm1\.(.+)": r"encoder.layer.\1.layernorm_before.\2",
    r"encoder\.layers\.(\d+)\.norm2\.(.+)": r"encoder.layer.\1.layernorm_after.\2",
    r"encoder\.layers\.(\d+)\.ls([12])": r"encoder.layer.\1.lambda_\2",
    r"encoder\.layers\.(\d+)\.attn\.proj\.(.+)": r"encoder.layer.\1.attention.projection_layer.\2",
    r"encoder\.layers\.(\d+)\.mlp\.(.+)": r"encoder.layer.\1.mlp.\2",
}
_FUSED = {
    r"encoder\.layers\.(\d+)\.attn\.qkv\.(.+)": tuple(
        rf"encoder.layer.\1.attention.{x}_proj.\2" for x in "qkv"
    )
}


def canonical(found: Weights, _: InternVit) -> Weights:
    """InternVL's own layout: other names, and queries, keys and values fused."""
    return renamed(found, _NAMES, _FUSED)
