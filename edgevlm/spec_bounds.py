"""Bounds of the numbers in a manifest's specs: beyond them no engine has sizes, and a picture would
take more memory than there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgevlm.specs import DecoderSpec, ImageSpec

_SIDE, _MANY, _LARGEST = 1 << 13, 1 << 12, 1 << 24
_IMAGE = {
    "size": (1, _SIDE),
    "tokens": (1, 1 << 16),
    "max_pictures": (1, _LARGEST),
    "resize": (0, 2 * _SIDE),
    "shortest": (0, _SIDE),
}
_TILES = {
    "longest_edge": (0, 1 << 16),
    "max_tiles": (0, _MANY),
    "least": (0, _MANY),
    "most": (0, _MANY),
}
_DECODER = {
    "n_embd": (1, 1 << 20),
    "n_layer": (1, 512),
    "n_vocab": (1, _LARGEST),
    "context_length": (1, _LARGEST),
    "short_context": (0, _LARGEST),
}


def out_of_bounds(image: ImageSpec, decoder: DecoderSpec | None) -> str:
    """The first number that no bundle has, as one line for a message; "" where all are well."""
    return next(_problems(image, decoder), "")


def _problems(image: ImageSpec, decoder: DecoderSpec | None) -> Iterator[str]:
    yield from _outside("image", image, _IMAGE)
    if not all(image.std):
        yield "'image.std' has a zero"
    if image.fill and not all(0 <= c <= 255 for c in image.fill):
        yield "'image.fill' is not a colour"
    if image.tiles:
        yield from _outside("image.tiles", image.tiles, _TILES)
        if not all(1 <= side <= 1 << 16 for canvas in image.tiles.canvases for side in canvas):
            yield "'image.tiles.canvases' has a side that is none"
        if not all(0 <= c <= 255 for c in image.tiles.fill):
            yield "'image.tiles.fill' is not a colour"
    if decoder:
        yield from _outside("decoder", decoder, _DECODER)


def _outside(where: str, spec: Any, bounds: dict[str, tuple[int, int]]) -> Iterator[str]:
    for key, (low, high) in bounds.items():
        value = getattr(spec, key)
        if not low <= value <= high:
            yield f"'{where}.{key}' is {str(value)[:20]}, not {low} to {high}"
