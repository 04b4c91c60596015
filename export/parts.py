"""The tensors that each kind of part must have: canonical names and shapes.

Canonical names follow transformers' modules without their prefixes. To add a kind of part, add a
function here and its builder in vision.py or decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from edgevlm.export.tensors import Tensor
from edgevlm.family import Config

Shapes = dict[str, tuple[int, ...]]
Part = Mapping[str, Tensor]

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


def eva(config: Config) -> Shapes:
    """An EVA tower as BLIP-2 has it: fused queries, keys and values, and a norm after the last
    layer. `positions` is the side of the grid that the checkpoint has position rows for.
    """
    d, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, d),
        "embeddings.patch_embedding.weight": (d, config["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding": (1, 1 + config["positions"] ** 2, d),
    }
    for i in range(config["num_hidden_layers"]):
        p = f"encoder.layers.{i}."
        shapes |= _norm(f"{p}layer_norm1", d) | _norm(f"{p}layer_norm2", d)
        shapes |= _linear(f"{p}self_attn.qkv", d, 3 * d)
        shapes |= _linear(f"{p}self_attn.projection", d, d)
        shapes |= _linear(f"{p}mlp.fc1", d, mlp) | _linear(f"{p}mlp.fc2", mlp, d)
    return shapes | _norm("post_layernorm", d)


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


def qformer(config: Config) -> Shapes:
    """BLIP-2's Q-Former without its half for text: learned queries that attend to the features,
    then the linear maps to the decoder's width (`widths`), one or several.
    """
    d, mlp = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"query_tokens": (1, config["queries"], d)} | _norm("layernorm", d)
    for i in range(config["num_hidden_layers"]):
        p = f"encoder.layer.{i}."
        shapes |= _attention(f"{p}attention", d, d)
        if i % config["cross_attention_frequency"] == 0:
            shapes |= _attention(f"{p}crossattention", d, config["in"])
        shapes |= _linear(f"{p}intermediate_query.dense", d, mlp)
        shapes |= _linear(f"{p}output_query.dense", mlp, d) | _norm(f"{p}output_query.LayerNorm", d)
    for i, (columns, rows) in enumerate(pairwise((d, *config["widths"]))):
        shapes |= _linear(f"maps.{i}", columns, rows)
    return shapes


def _attention(prefix: str, d: int, columns: int) -> Shapes:
    shapes = _linear(f"{prefix}.attention.query", d, d)
    shapes |= _linear(f"{prefix}.attention.key", columns, d)
    shapes |= _linear(f"{prefix}.attention.value", columns, d)
    return shapes | _linear(f"{prefix}.output.dense", d, d) | _norm(f"{prefix}.output.LayerNorm", d)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


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


def phi2(config: Config) -> Shapes:
    """A Phi decoder; with `extra_norms` also TinyGPT-V's, on queries, keys and the attention."""
    d, mlp, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {EMBED: (rows, d)} | _norm("final_layernorm", d) | _linear("lm_head", d, rows)
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        shapes |= _norm(f"{p}input_layernorm", d)
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            shapes |= _linear(f"{p}self_attn.{name}", d, d)
        shapes |= _linear(f"{p}mlp.fc1", d, mlp) | _linear(f"{p}mlp.fc2", mlp, d)
        if config["extra_norms"]:
            for name in ("q_layernorm", "k_layernorm"):
                shapes |= _norm(f"{p}self_attn.{name}", config["head_dim"])
            shapes[f"{p}post_layernorm.weight"] = (d,)
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
    "eva": eva,
    "linear": linear,
    "mlp": mlp,
    "ldp": ldp,
    "ldpv2": ldpv2,
    "qformer": qformer,
    "llama": llama,
    "phi3": phi3,
    "gemma": gemma,
    "gemma2": gemma2,
    "phi2": phi2,
}
