"""SigLIP's tower: transformers' own, every patch after the last norm or without it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer

from edgevlm.export.checkpoint.computed import reshaped
from edgevlm.export.checkpoint.layouts import renamed
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx.modules import IndexedTower, transformers_config
from edgevlm.parts.siglip import SiglipTower


class SiglipModule(IndexedTower):
    """See edgevlm/parts/siglip.py."""

    def __init__(self, config: SiglipTower) -> None:
        super().__init__()
        self.config = transformers_config(SiglipVisionConfig, config, vision_use_head=False)
        self.tower = SiglipVisionTransformer(self.config)
        if not config.final_norm:
            self.tower.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of every patch."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


build = SiglipModule

# timm's names (vision_transformer.py) -> transformers'.
_POSITIONS = "embeddings.position_embedding.weight"
_NAMES = {
    r"pos_embed": _POSITIONS,
    r"patch_embed\.proj\.(.+)": r"embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm([12])\.(.+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(.+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.(.+)": r"encoder.layers.\1.mlp.\2",
    r"norm\.(.+)": r"post_layernorm.\1",
}
_FUSED = {
    r"blocks\.(\d+)\.attn\.qkv\.(.+)": tuple(
        rf"encoder.layers.\1.self_attn.{x}_proj.\2" for x in "qkv"
    )
}


def canonical(found: Weights, _: SiglipTower) -> Weights:
    """timm's layout: other names, queries, keys and values fused, positions of a batch of one."""
    out = renamed(found, _NAMES, _FUSED)
    stored = out.get(_POSITIONS)
    if stored and len(stored.shape) == 3 and stored.shape[0] == 1:
        out[_POSITIONS] = reshaped(stored, stored.shape[1:])
    return out
