"""Qwen2-VL's and Qwen2.5-VL's vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, layer_norm, linear_map


@dataclass(frozen=True, kw_only=True)
class Qwen2Vit(VisionTower):
    """Qwen2-VL's tower, which sees pictures of any size, turned by their patches' places; or, where
    it is `gated`, Qwen2.5-VL's, with gated nets and norms without a mean.

    Features are in squares of `merge` x `merge` patches, line by line. Sides are multiples of
    `image_size`, that of such a square, and have `reach` patches at most. Layers but `full_layers`
    see windows of `window` x `window` squares; with 0 all see everything. Its pixels are those of a
    still picture, which the original repeats in time, or of `frames` frames one behind the other.
    """

    merge: int
    frames: int
    reach: int
    gated: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()

    @property
    def pixels(self) -> tuple[int, int, int]:
        """See VisionTower; -1 is the picture's to say, and `num_channels` of each frame."""
        return (-1, -1, -1)

    @property
    def features(self) -> tuple[int, int]:
        """See VisionTower."""
        return (-1, self.hidden_size)

    def tensors(self) -> Shapes:
        """See Part."""
        d, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        kernel = (d, self.num_channels, self.frames, patch, patch)
        shapes: Shapes = {"patch_embed.proj.weight": kernel}
        for i in range(self.num_hidden_layers):
            p = f"blocks.{i}."
            for norm in ("norm1", "norm2"):
                shapes |= {f"{p}{norm}.weight": (d,)} if self.gated else layer_norm(p + norm, d)
            shapes |= linear_map(f"{p}attn.qkv", d, 3 * d) | linear_map(f"{p}attn.proj", d, d)
            inner = ("gate_proj", "up_proj") if self.gated else ("fc1",)
            for name in inner:
                shapes |= linear_map(f"{p}mlp.{name}", d, mlp)
            shapes |= linear_map(f"{p}mlp.{'down_proj' if self.gated else 'fc2'}", mlp, d)
        return shapes
