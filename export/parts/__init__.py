"""A room for each kind of part: all that the exporter knows of one, and nothing else does.

The room of a config in edgevlm/parts/NAME.py is NAME.py here, found by the config's type as a
family is by its name: there is no table to edit.

A tower's or a connector's room has `NET`, which makes an ONNX graph of its tensors. A decoder's has
`GRAPH`, what llama.cpp's graph of its architecture expects of a GGUF. Any room may have
`canonical(tensors, config)`: the tensors of layouts that fuse, split or adapt them, under canonical
names and in canonical shapes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.parts import Decoder, Part

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from edgevlm.export.onnx.graph import Builder, Value

# A layer of Decoder.gated's without what differs, GGUF's names -> canonical ones.
GATED: Mapping[str, str | tuple[str, ...]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Graph:
    """GGUF names and metadata that llama.cpp's graph of an architecture expects.

    layer: GGUF's names of a layer's tensors -> the canonical name, or those of matrices that are
        stacked one below the other.
    metadata: adds what the architecture has beside what all decoders have; is given the config and
        the tensors.
    extra: config -> tensors that no checkpoint has, float32 by GGUF's names.
    gain: GGUF name, config -> what a tensor is multiplied by.
    norm_offset: what is added to the weights of norms, before that.
    permuted: whether rotary positions turn neighbouring rows of queries and keys, as in Meta's
        files; transformers' turn rows that lie half a head apart.
    """

    layer: Mapping[str, str | tuple[str, ...]]
    metadata: Callable[[GGUFWriter, Any, Weights], None] = lambda *_: None
    extra: Callable[[Any], Mapping[str, NDArray[np.float32]]] = lambda _: {}
    gain: Callable[[str, Any], float] = lambda *_: 1.0
    norm_offset: float = 0.0
    permuted: bool = False


@dataclass(frozen=True)
class Net:
    """A tower or a connector as an ONNX graph.

    build: adds the operators to a builder; is given the config and the input, pixels or features,
        and returns the output.
    quantized: whether bundles have it at the vision precision, which pays from a hundred million
        weights on; otherwise it stays in float32.
    newline: the tensors that the rows between the lines of a picture are made of, which lie beside
        the graph; none in most.
    rows: config, tensors -> those rows, float32 [n_embd] or, with several, [rows, n_embd].
    """

    build: Callable[[Builder, Any, Value], Value]
    quantized: bool = False
    newline: tuple[str, ...] = ()
    rows: Callable[[Any, Weights], NDArray[np.float32]] | None = None


def net(config: Part) -> Net:
    """Looks up the graph of a tower's or a connector's config."""
    found = room(config).NET
    assert isinstance(found, Net)
    return found


def graph(config: Decoder) -> Graph:
    """Looks up llama.cpp's graph for a decoder's config."""
    found = room(config).GRAPH
    assert isinstance(found, Graph)
    return found


def room(config: Part) -> ModuleType:
    """The room of a config's kind."""
    return importlib.import_module(f"edgevlm.export.parts.{config.kind}")
