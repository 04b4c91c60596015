"""Which tensor is which: names and shapes that each kind of part must have, all accounted for.

Canonical names follow transformers' modules without their prefixes. To add a kind of part, add a
function here and its builder in vision.py or decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from edgevlm.errors import SourceError
from edgevlm.export.source import Checkpoint
from edgevlm.export.tensors import DTYPES, SourceTensor
from edgevlm.family import IGNORED, Config, Family, Model

Shapes = dict[str, tuple[int, ...]]
Part = Mapping[str, SourceTensor]

LM_HEAD = "lm_head.weight"
EMBED = "embed_tokens.weight"


def siglip(config: Config) -> Shapes:
    """A SigLIP vision tower without its pooling head."""
    d, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (d, config["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": (positions, d),
    }
    for i in range(config["num_hidden_layers"]):
        p = f"encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{p}{name}.weight": (d,), f"{p}{name}.bias": (d,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{p}self_attn.{name}", d, d)
        shapes |= _linear(f"{p}mlp.fc1", d, mlp) | _linear(f"{p}mlp.fc2", mlp, d)
    return shapes | {"post_layernorm.weight": (d,), "post_layernorm.bias": (d,)}


def linear(config: Config) -> Shapes:
    """A projector that is one linear map."""
    return _linear("linear", config["in"], config["out"])


def _linear(name: str, columns: int, rows: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def gemma(config: Config) -> Shapes:
    """A Gemma decoder; its output table is its input table."""
    return _gemma(config, ("input_layernorm", "post_attention_layernorm"))


def gemma2(config: Config) -> Shapes:
    """A Gemma 2 decoder: as Gemma, with four norms a layer."""
    return _gemma(
        config,
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    )


def _gemma(config: Config, norms: tuple[str, ...]) -> Shapes:
    d, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {EMBED: (config["vocab_size"], d), "norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        shapes |= {f"{p}{name}.weight": (d,) for name in norms}
        shapes |= {
            f"{p}self_attn.q_proj.weight": (q, d),
            f"{p}self_attn.k_proj.weight": (kv, d),
            f"{p}self_attn.v_proj.weight": (kv, d),
            f"{p}self_attn.o_proj.weight": (d, q),
            f"{p}mlp.gate_proj.weight": (mlp, d),
            f"{p}mlp.up_proj.weight": (mlp, d),
            f"{p}mlp.down_proj.weight": (d, mlp),
        }
    return shapes


KINDS: dict[str, Callable[[Config], Shapes]] = {
    "siglip": siglip,
    "linear": linear,
    "gemma": gemma,
    "gemma2": gemma2,
}


def assign(checkpoint: Checkpoint, family: Family, model: Model) -> dict[str, Part]:
    """The tensors of "vision", "projector" and "decoder" by canonical name.

    Raises SourceError when a tensor is missing, left over, or of another shape or type than the
    config says.
    """
    configs = {"vision": model.vision, "projector": model.projector, "decoder": model.text}
    expected = {
        f"{part}.{name}": shape
        for part, config in configs.items()
        for name, shape in KINDS[config["kind"]](config).items()
    }
    found = _located(checkpoint, family)
    head = found.pop(f"decoder.{LM_HEAD}", None)
    for name in found:
        if name not in expected:
            raise SourceError(f"{_at(found[name])} has no place in this model; check config.json")
    for name, shape in expected.items():
        if name not in found:
            raise SourceError(
                f"{checkpoint.folder}: lacks the tensor for {name}; download it again"
            )
        _check(found[name], shape)
    if head:
        _check_tied(head, found[f"decoder.{EMBED}"])
    return {
        part: {n.removeprefix(f"{part}."): t for n, t in found.items() if n.startswith(f"{part}.")}
        for part in configs
    }


def _located(checkpoint: Checkpoint, family: Family) -> dict[str, SourceTensor]:
    found: dict[str, SourceTensor] = {}
    for tensor in checkpoint.tensors.values():
        name = family.locate(tensor.name)
        if name == IGNORED:
            continue
        if name is None:
            raise SourceError(f"{_at(tensor)} is unknown to the family {family.name!r}")
        if name in found:
            raise SourceError(f"{_at(tensor)} and {found[name].name} are the same; remove one")
        found[name] = tensor
    return found


def _check(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in DTYPES:
        raise SourceError(
            f"{_at(tensor)} is stored as {tensor.dtype}, not as {', '.join(DTYPES)}; "
            "export the original float checkpoint"
        )
    if tensor.shape != shape:
        raise SourceError(
            f"{_at(tensor)} has shape {list(tensor.shape)}, config.json says {list(shape)}"
        )


def _check_tied(head: SourceTensor, embed: SourceTensor) -> None:
    """A stored output table is allowed when it repeats the input table, which is written once."""
    _check(head, embed.shape)
    same = head.dtype == embed.dtype and all(np.array_equal(a, b) for a, b in _pairs(head, embed))
    if not same:
        raise SourceError(
            f"{_at(head)} differs from {embed.name}; this architecture has only one table for both"
        )


def _pairs(a: SourceTensor, b: SourceTensor) -> Iterator[tuple[Any, Any]]:
    return zip_longest(a.blocks(), b.blocks())


def _at(tensor: SourceTensor) -> str:
    return f"{tensor.file}: {tensor.name}"
