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
from edgevlm.family import IGNORED, TOWER, Config, Family, Model

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
        shapes |= _vision_layer(f"encoder.layers.{i}.", d, mlp)
    return shapes | {"post_layernorm.weight": (d,), "post_layernorm.bias": (d,)}


def clip(config: Config) -> Shapes:
    """A CLIP vision tower up to the layer whose output is read; no final norm, no head."""
    d, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: Shapes = {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, config["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2 + 1, d),
        "pre_layrnorm.weight": (d,),
        "pre_layrnorm.bias": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= _vision_layer(f"encoder.layers.{i}.", d, mlp)
    return shapes


def patches(config: Config) -> int:
    """Rows of features that a tower makes of one picture."""
    side = config["image_size"] // config["patch_size"]
    return int(side * side + config.get("class_token", 0))


def _vision_layer(prefix: str, d: int, mlp: int) -> Shapes:
    shapes: Shapes = {}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{prefix}{name}.weight": (d,), f"{prefix}{name}.bias": (d,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(f"{prefix}self_attn.{name}", d, d)
    return shapes | _linear(f"{prefix}mlp.fc1", d, mlp) | _linear(f"{prefix}mlp.fc2", mlp, d)


def linear(config: Config) -> Shapes:
    """A projector that is one linear map."""
    return _linear("linear", config["in"], config["out"])


def mlp(config: Config) -> Shapes:
    """A projector of several linear maps with GELU between them."""
    shapes = _linear("0", config["in"], config["out"])
    for i in range(1, config["depth"]):
        shapes |= _linear(str(2 * i), config["out"], config["out"])
    return shapes


def ldp(config: Config) -> Shapes:
    """MobileVLM's projector: two linear maps, then two inverted residual blocks."""
    d = config["out"]
    shapes = _linear("mlp.1", config["in"], d) | _linear("mlp.3", d, d)
    for block in ("mb_block.1.block.", "mb_block.2.block."):
        squeezed = ldp_squeezed(d)
        shapes |= {f"{block}0.0.weight": (d, 1, 3, 3), f"{block}2.0.weight": (d, d, 1, 1)}
        for norm in ("0.1", "2.1"):
            shapes |= {f"{block}{norm}.weight": (d,), f"{block}{norm}.bias": (d,)}
        shapes |= {f"{block}1.fc1.weight": (squeezed, d, 1, 1), f"{block}1.fc1.bias": (squeezed,)}
        shapes |= {f"{block}1.fc2.weight": (d, squeezed, 1, 1), f"{block}1.fc2.bias": (d,)}
    return shapes


def ldp_squeezed(width: int) -> int:
    """Channels between the two convolutions of squeeze and excitation, as torchvision has them:
    a quarter, to a multiple of 8, never below nine tenths of it.
    """
    quarter = width // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


def ldpv2(config: Config) -> Shapes:
    """MobileVLM V2's projector: two linear maps, pooling, one depthwise convolution."""
    d = config["out"]
    shapes = _linear("mlp.mlp.0", config["in"], d) | _linear("mlp.mlp.2", d, d)
    return shapes | {"peg.peg.0.weight": (d, 1, 3, 3), "peg.peg.0.bias": (d,)}


def _linear(name: str, columns: int, rows: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def gemma(config: Config) -> Shapes:
    """A Gemma decoder; its output table is its input table."""
    return _decoder(config, ("input_layernorm", "post_attention_layernorm"))


def gemma2(config: Config) -> Shapes:
    """A Gemma 2 decoder: as Gemma, with four norms a layer."""
    return _decoder(
        config,
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    )


def llama(config: Config) -> Shapes:
    """A LLaMA or Mistral decoder; its output table is its own unless the config ties it."""
    shapes = _decoder(config, ("input_layernorm", "post_attention_layernorm"))
    if not config["tie_word_embeddings"]:
        shapes[LM_HEAD] = (config["vocab_size"], config["hidden_size"])
    return shapes


def phi3(config: Config) -> Shapes:
    """A Phi-3 decoder: LLaMA's with queries, keys and values in one matrix, gate and up in one."""
    shapes = llama(config)
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        for fused, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            matrices = [shapes.pop(f"{p}{part}.weight") for part in parts]
            shapes[f"{p}{fused}.weight"] = (sum(m[0] for m in matrices), matrices[0][1])
    return shapes


def _decoder(config: Config, norms: tuple[str, ...]) -> Shapes:
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
    "clip": clip,
    "linear": linear,
    "mlp": mlp,
    "ldp": ldp,
    "ldpv2": ldpv2,
    "llama": llama,
    "phi3": phi3,
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
    found = _located(checkpoint, family, model)
    tied = f"decoder.{LM_HEAD}" not in expected
    head = found.pop(f"decoder.{LM_HEAD}", None) if tied else None
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


def _located(checkpoint: Checkpoint, family: Family, model: Model) -> dict[str, SourceTensor]:
    found: dict[str, SourceTensor] = {}
    tensors = [(t.name, t) for t in checkpoint.tensors.values()]
    if tower := checkpoint.tower:
        # A copy inside the checkpoint is rounded; the original projects never look at it.
        tensors = [(n, t) for n, t in tensors if not (family.locate(n) or "").startswith("vision.")]
        tensors += [(TOWER + t.name, t) for t in tower.tensors.values()]
    for source, tensor in tensors:
        name = family.locate(source)
        if name == IGNORED or (name and name.startswith(model.skipped)):
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
