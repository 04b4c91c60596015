"""Phi-2's decoder, TinyGPT-V's with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgevlm.parts import EMBED, Decoder, Shapes, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class Phi2(Decoder):
    """A Phi-2; rotary positions turn `rotary_dim` dimensions of a head.

    With `extra_norms` it has TinyGPT-V's, of queries, keys and the attention's output.
    `lora_alpha` is what adapters are scaled by, times their rank.
    """

    architecture: ClassVar[str] = "phi2"

    layer_norm_eps: float
    rotary_dim: int
    extra_norms: bool
    lora_alpha: float

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp, rows = self.hidden_size, self.intermediate_size, self.vocab_size
        shapes: Shapes = {EMBED: (rows, d)} | layer_norm("final_layernorm", d)
        shapes |= linear_map("lm_head", d, rows)
        for i in range(self.num_hidden_layers):
            p = f"layers.{i}."
            shapes |= layer_norm(f"{p}input_layernorm", d)
            for name in ("q_proj", "k_proj", "v_proj", "dense"):
                shapes |= linear_map(f"{p}self_attn.{name}", d, d)
            shapes |= linear_map(f"{p}mlp.fc1", d, mlp) | linear_map(f"{p}mlp.fc2", mlp, d)
            if self.extra_norms:
                for name in ("q_layernorm", "k_layernorm"):
                    shapes |= layer_norm(f"{p}self_attn.{name}", self.head_dim)
                shapes[f"{p}post_layernorm.weight"] = (d,)
        return shapes
