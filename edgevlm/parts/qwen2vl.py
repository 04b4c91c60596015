"""Qwen2-VL's and Qwen2.5-VL's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts.qwen2 import Qwen2
from edgevlm.specs import Positions


@dataclass(frozen=True, kw_only=True)
class Qwen2Vl(Qwen2):
    """A Qwen2 with M-RoPE: of the pairs of a head's dimensions the first `mrope_section[0]` are
    turned by a row's time, the next by its line and the last by its column.
    """

    architecture: ClassVar[str] = "qwen2vl"
    positions: ClassVar[Positions] = "mrope"

    mrope_section: tuple[int, ...] = ()
