"""Precisions for each kind of device: a table, to be read and to be argued with.

What an explicit option says comes first. Only the laptop's set was measured on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.errors import ExportError


@dataclass(frozen=True)
class Target:
    """A decoder's and the vision encoders' precisions, the main one first."""

    quant: str
    vision: tuple[str, ...]


TARGETS: Mapping[str, Target] = {
    # 8-bit products are the processor's fastest (docs/measurements.md).
    "laptop": Target("q4_k_m", ("int8",)),
    # The smallest type that llama.cpp re-orders for every generation of ARM (docs/phones.md).
    "phone": Target("q4_0", ("int8",)),
    # NPUs compile fixed ranges or halves; int8 is for the processor, should the NPU refuse.
    "npu": Target("q4_k_m", ("int8", "qdq8", "fp16")),
    # GPUs compute in half; int8 as above.
    "gpu": Target("q4_k_m", ("fp16", "int8")),
}


def target(name: str) -> Target:
    """The target of that name; raises ExportError."""
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is not known; choose from {', '.join(TARGETS)}")
    return TARGETS[name]
