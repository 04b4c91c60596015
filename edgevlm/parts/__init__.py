"""The parts that models are made of, as typed configs: one file for each kind, no engine.

A part is a vision tower, a connector or a decoder. A family reads a checkpoint's config into its
parts; what the exporter knows of a part stands in the file of the same name in export/parts/.
Canonical names of tensors follow transformers' modules without their prefixes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

from edgevlm.specs import Positions

Shapes = dict[str, tuple[int, ...]]

EMBED = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# The largest number of 32 bits.
_MOST = 3.4028234e38
# Numbers of decoders that others are divided by.
_DIVISORS = ("rope_theta", "rope_local_base_freq", "rope_factor", "query_pre_attn_scalar")
# Activations of vision towers, by transformers' names.
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """A part of a model: its sizes and settings, under transformers' names where it has one."""

    @property
    def kind(self) -> str:
        """The name of its file, here and in export/parts/."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def tensors(self) -> Shapes:
        """The tensors that it must have: canonical names and shapes."""


@dataclass(frozen=True, kw_only=True)
class VisionTower(Part):
    """A vision tower: pixels [n, num_channels, image_size, image_size] -> features
    [n, rows, hidden_size].

    `num_hidden_layers` are run; `depth` is how many the checkpoint has, None for no more. Raises
    ValueError for an activation that is not in ACTIVATIONS.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"the vision tower's hidden_act {self.hidden_act!r} is not in {known}")

    @property
    def grid(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.patch_size

    @property
    def pixels(self) -> tuple[int, int, int]:
        """The shape of one picture."""
        return (self.num_channels, self.image_size, self.image_size)

    @property
    def rows(self) -> int:
        """Rows of features that it makes of one picture."""
        return self.grid**2

    @property
    def features(self) -> tuple[int, int]:
        """The shape of what it makes of one picture."""
        return (self.rows, self.hidden_size)

    @property
    def unread(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the checkpoint has and the tower never reads."""
        layers = range(self.num_hidden_layers, self.depth or self.num_hidden_layers)
        return tuple(f"encoder.layers.{i}." for i in layers)


@dataclass(frozen=True, kw_only=True)
class Head(Part):
    """A pooling head: a picture's features [n, rows, hidden_size] -> one row of it, [n, width]."""

    hidden_size: int
    layer_norm_eps: float

    @property
    @abstractmethod
    def width(self) -> int:
        """Length of the row."""


@dataclass(frozen=True, kw_only=True)
class Connector(Part):
    """A connector: features [n, rows, in_features] -> image embeddings [n, tokens, n_embd]."""

    in_features: int

    def tokens(self, rows: int) -> int:
        """Image embeddings that it makes of that many rows of features."""
        return rows


@dataclass(frozen=True, kw_only=True)
class Decoder(Part):
    """A language decoder; `architecture` is llama.cpp's name of its graph.

    Raises ValueError for a number that its file, which has them in 32 bits, cannot hold, and for
    one that nothing can be divided by.
    """

    architecture: ClassVar[str]
    positions: ClassVar[Positions] = "sequential"

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not abs(value) <= _MOST:
                raise ValueError(
                    f"the decoder's {each.name} is {value:g}; it does not fit into 32 bits"
                )
            if each.name in _DIVISORS and value <= 0:
                raise ValueError(f"the decoder's {each.name} is {value:g}; it has to be above 0")

    @property
    def short_context(self) -> int:
        """Positions that are turned otherwise than where there are more; 0 where none are."""
        return 0

    def gated(self, *norms: str) -> Shapes:
        """The tensors of a decoder with a gated feed-forward net, no biases, and these norms in a
        layer; its output table is its input table.
        """
        d, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: Shapes = {EMBED: (self.vocab_size, d), "norm.weight": (d,)}
        for i in range(self.num_hidden_layers):
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


def uneven_heads(parts: Iterable[Part]) -> str:
    """The first part whose heads do not share its width, as one line for a message; "" where all
    do. Decoders say themselves how wide theirs are.
    """
    for part in parts:
        heads = None if isinstance(part, Decoder) else getattr(part, "num_attention_heads", None)
        width = getattr(part, "hidden_size", 0)
        if heads is not None and (heads < 1 or width % heads):
            return f"the {part.kind}'s num_attention_heads is {heads}; its hidden_size is {width}"
    return ""


def linear_map(name: str, columns: int, rows: int) -> Shapes:
    """A linear map with a bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def layer_norm(name: str, width: int) -> Shapes:
    """A norm with a bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def encoder_layer(prefix: str, width: int, mlp: int) -> Shapes:
    """A layer of a vision tower with queries, keys and values apart."""
    shapes = layer_norm(f"{prefix}layer_norm1", width) | layer_norm(f"{prefix}layer_norm2", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= linear_map(f"{prefix}self_attn.{name}", width, width)
    return (
        shapes
        | linear_map(f"{prefix}mlp.fc1", width, mlp)
        | linear_map(f"{prefix}mlp.fc2", mlp, width)
    )
