"""A dual encoder's side of pictures: a vision tower and a head behind it."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Head, Part, Shapes, VisionTower


@dataclass(frozen=True, kw_only=True)
class PictureEncoder(Part):
    """Pixels [n, num_channels, image_size, image_size] -> unit rows [n, width]."""

    tower: VisionTower
    head: Head

    @property
    def width(self) -> int:
        """Length of a picture's row."""
        return self.head.width

    def tensors(self) -> Shapes:
        """See Part."""
        return self.tower.tensors() | self.head.tensors()
