"""Phi-2's decoder as a GGUF, TinyGPT-V's with it; the layouts and adapters of its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from gguf import GGUFWriter

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.computed import adapted, rows, zeros
from edgevlm.export.checkpoint.tensors import Tensor, Weights
from edgevlm.export.parts import Graph
from edgevlm.parts.phi2 import Phi2

Tensors = dict[str, Tensor]

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_QKV = ("q_proj", "k_proj", "v_proj")
# Norms that llama.cpp's graph lacks, kept in the metadata for the runtime; an unknown tensor
# llama.cpp would refuse.
_EXTRA_NORMS = {
    "attn_q_norm.weight": "self_attn.q_layernorm.weight",
    "attn_q_norm.bias": "self_attn.q_layernorm.bias",
    "attn_k_norm.weight": "self_attn.k_layernorm.weight",
    "attn_k_norm.bias": "self_attn.k_layernorm.bias",
    "post_attention_norm.weight": "post_layernorm.weight",
}


def _metadata(writer: GGUFWriter, config: Phi2, tensors: Weights) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    layers = range(config.num_hidden_layers)
    for target, name in _EXTRA_NORMS.items() if config.extra_norms else ():
        values = np.concatenate([tensors[f"layers.{i}.{name}"].float32() for i in layers])
        writer.add_array(f"tinygptv.{target}", values.tolist())


GRAPH = Graph(
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
    metadata=_metadata,
)


def canonical(found: Weights, config: Phi2) -> Weights:
    """Queries, keys and values apart, adapters merged, biases that norms were saved without.

    transformers 4.36 fuses rows head by head (query_key_value), Microsoft's code kind by kind
    (Wqkv); an adapter has the layout of the matrix that it was trained on.
    """
    heads, width = config.num_attention_heads, config.head_dim
    axes = {"query_key_value": ((heads, 3, width), 1), "Wqkv": ((3, heads, width), 0)}
    out: Tensors = {}
    adapters: Tensors = {}
    for name, tensor in found.items():
        if name.endswith((_DOWN, _UP)):
            adapters[name] = tensor
            continue
        for target, apart in _apart(name, tensor, axes).items():
            if target in out:
                raise SourceError(
                    f"{tensor.file}: {tensor.name} and {out[target].name} are the same; remove one"
                )
            out[target] = apart
    _check_every_layer(adapters, config.num_hidden_layers)
    _merge(out, adapters, axes, config)
    if config.extra_norms:
        _add_biases(out)
    return out


def _apart(
    name: str, tensor: Tensor, axes: Mapping[str, tuple[tuple[int, ...], int]]
) -> dict[str, Tensor]:
    """A fused tensor as three; any other as it is."""
    match = re.fullmatch(r"(.+\.)(query_key_value|Wqkv)(\..+)", name)
    if not match:
        return {name: tensor}
    stem, fused, suffix = match.groups()
    sides, axis = axes[fused]
    n = sides[0] * sides[1] * sides[2]
    if tensor.shape[0] != n:
        raise SourceError(
            f"{tensor.file}: {tensor.name} has {tensor.shape[0]} rows, config.json says {n}"
        )
    return {f"{stem}{q}{suffix}": rows(tensor, sides, axis, i) for i, q in enumerate(_QKV)}


def _merge(
    out: Tensors,
    adapters: Tensors,
    axes: Mapping[str, tuple[tuple[int, ...], int]],
    config: Phi2,
) -> None:
    """Adds every adapter to its matrix, scaled by alpha / rank."""
    for name, down in adapters.items():
        stem = name.removesuffix(_DOWN)
        if stem == name:
            if name.removesuffix(_UP) + _DOWN not in adapters:
                raise SourceError(f"{down.file}: has {down.name} without its lora_A")
            continue
        up = adapters.get(stem + _UP)
        if up is None:
            raise SourceError(f"{down.file}: has {down.name} without its lora_B")
        for target, part in _apart(f"{stem}.weight", up, axes).items():
            base = out.get(target)
            if base is None:
                raise SourceError(f"{down.file}: has {down.name}, and no file has its matrix")
            if (part.shape[0], down.shape[1], part.shape[1]) != (*base.shape, down.shape[0]):
                raise SourceError(
                    f"{down.file}: {down.name} {list(down.shape)} and lora_B {list(up.shape)} are "
                    f"an adapter of another model, the matrix is {list(base.shape)}"
                )
            out[target] = adapted(base, down, part, config.lora_alpha / down.shape[0])


def _check_every_layer(adapters: Tensors, n_layer: int) -> None:
    """An adapter of a kind is there in all layers or in none."""
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in adapters.items():
        kinds.setdefault(re.sub(r"^layers\.\d+\.", "", name), []).append(tensor)
    for kind, tensors in kinds.items():
        if len(tensors) != n_layer:
            raise SourceError(
                f"{tensors[0].file}: has {kind} for {len(tensors)} layers, the decoder has "
                f"{n_layer}; it is damaged or of another model"
            )


def _add_biases(out: Tensors) -> None:
    for name, weight in list(out.items()):
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(("q_layernorm.weight", "k_layernorm.weight")) and bias not in out:
            out[bias] = zeros(weight, bias)
