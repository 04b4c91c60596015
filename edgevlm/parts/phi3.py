"""Phi-3's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Shapes
from edgevlm.parts.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Phi3(Llama):
    """A Phi-3: LLaMA's with queries, keys and values in one matrix, gate and up in one.

    With `long_factors` the frequencies of the rotary positions are divided by them where a text has
    more than `original_positions` tokens, and by the `short_factors` where it has not; the angles'
    sines and cosines are multiplied by `rope_gain`.
    """

    architecture: ClassVar[str] = "phi3"

    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_positions: int = 0
    rope_gain: float = 1.0

    @property
    def short_context(self) -> int:
        """See Decoder."""
        return self.original_positions

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = super().tensors()
        for i in range(self.num_hidden_layers):
            p = f"layers.{i}."
            for fused, parts in (
                ("self_attn.qkv_proj", tuple(f"self_attn.{x}_proj" for x in "qkv")),
                ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                matrices = [shapes.pop(f"{p}{part}.weight") for part in parts]
                shapes[f"{p}{fused}.weight"] = (sum(m[0] for m in matrices), matrices[0][1])
        return shapes
