"""FastViTHD, the vision tower of FastVLM."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Shapes, VisionTower, layer_norm, linear_map

# Channels of a head.
HEAD = 32
# What the squeeze behind the last stage leaves of its channels.
_SQUEEZE = 16


@dataclass(frozen=True, kw_only=True)
class FastVit(VisionTower):
    """FastViTHD: stages of convolutions, the last `attending` of them with attention, each on a map
    of half the sides; its features are the last map, line by line.

    `widths`, `depths` and `mlps` are the channels, the blocks and the inner channels of each stage.
    Convolutions stand for all their branches, with the norms behind them, as for inference.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    mlps: tuple[int, ...]
    attending: int

    def attends(self, stage: int) -> bool:
        """True if a stage has attention, and positions before it."""
        return stage >= len(self.widths) - self.attending

    def tensors(self) -> Shapes:
        """See Part."""
        first, last = self.widths[0], self.hidden_size
        shapes = _conv("stem.0", first, self.num_channels, 3)
        shapes |= _conv("stem.1", first, 1, 3) | _conv("stem.2", first, first, 1)
        for i, (width, depth, mlp) in enumerate(
            zip(self.widths, self.depths, self.mlps, strict=True)
        ):
            stage = f"stages.{i}."
            if i:
                shapes |= _conv(f"{stage}downsample.0", width, 1, 7)
                shapes |= _conv(f"{stage}downsample.1", width, width, 1)
            if self.attends(i):
                shapes |= _conv(f"{stage}positions", width, 1, 7)
            for j in range(depth):
                block = f"{stage}blocks.{j}."
                if self.attends(i):
                    shapes |= layer_norm(f"{block}norm", width)
                    for name in "qkv":
                        shapes[f"{block}attention.{name}_proj.weight"] = (width, width)
                    shapes |= linear_map(f"{block}attention.proj", width, width)
                else:
                    shapes |= _conv(f"{block}mixer", width, 1, 3)
                shapes |= _conv(f"{block}mlp.conv", width, 1, 7)
                shapes |= linear_map(f"{block}mlp.fc1", width, mlp)
                shapes |= linear_map(f"{block}mlp.fc2", mlp, width)
        squeezed = last // _SQUEEZE
        shapes |= _conv("final.conv", last, 1, 3)
        return (
            shapes | _conv("final.fc1", squeezed, last, 1) | _conv("final.fc2", last, squeezed, 1)
        )


def _conv(name: str, width: int, given: int, side: int) -> Shapes:
    """A convolution of `given` channels for each group."""
    return {f"{name}.weight": (width, given, side, side), f"{name}.bias": (width,)}
