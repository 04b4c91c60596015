"""Qwen2's and Qwen2.5's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import Shapes
from edgevlm.parts.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """A Qwen2: LLaMA's with biases of queries, keys and values."""

    architecture: ClassVar[str] = "qwen2"

    def tensors(self) -> Shapes:
        """See Part."""
        shapes = super().tensors()
        for i in range(self.num_hidden_layers):
            for part in "qkv":
                name = f"layers.{i}.self_attn.{part}_proj"
                shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
        return shapes
