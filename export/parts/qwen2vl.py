"""Qwen2-VL's and Qwen2.5-VL's decoder as a GGUF."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFWriter

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parts import llama, qwen2
from edgevlm.parts.qwen2vl import Qwen2Vl


def _metadata(writer: GGUFWriter, config: Qwen2Vl, tensors: Weights) -> None:
    llama.metadata(writer, config, tensors)
    # llama.cpp has four axes, the last of which nothing is turned by.
    writer.add_rope_dimension_sections([*config.mrope_section, 0])


GRAPH = replace(qwen2.GRAPH, metadata=_metadata)
