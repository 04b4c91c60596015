"""Moondream2's region model."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.parts import Part, Shapes, linear_map


@dataclass(frozen=True, kw_only=True)
class Regions(Part):
    """Places and sizes out of a decoder's last layer, and back into rows that it reads.

    Of a row of `hidden_size` two linear maps, with GELU's tanh form between them, make logits of
    `coord_bins` places along a side, two others of `size_bins` widths and as many heights. A place,
    or a width and a height, become a row by cosines and sines, `coord_features` and `size_features`
    of them, and one linear map.
    """

    hidden_size: int
    inner_size: int
    coord_features: int
    coord_bins: int
    size_features: int
    size_bins: int

    def tensors(self) -> Shapes:
        """See Part."""
        d, inner = self.hidden_size, self.inner_size
        shapes: Shapes = {
            "coord_features": (1, self.coord_features // 2),
            "size_features": (2, self.size_features // 2),
        }
        for kind, features, bins in (
            ("coord", self.coord_features, self.coord_bins),
            ("size", self.size_features, 2 * self.size_bins),
        ):
            shapes |= linear_map(f"{kind}_encoder", features, d)
            shapes |= linear_map(f"{kind}_decoder.fc1", d, inner)
            shapes |= linear_map(f"{kind}_decoder.fc2", inner, bins)
        return shapes
