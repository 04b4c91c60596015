"""Pictures: anything a caller has -> RGB uint8 [h, w, 3] -> pixels float32 [tiles, 3, size, size].

Pillow is the only image library, so an installed package never changes a number.
"""

from edgevlm.image.pixels import Pixels, cut, preprocess
from edgevlm.image.read import (
    MAX_PIXELS,
    RGB,
    ImageSource,
    Picture,
    picture_size,
    read_image,
    read_picture,
)

__all__ = [
    "MAX_PIXELS",
    "RGB",
    "ImageSource",
    "Picture",
    "Pixels",
    "cut",
    "picture_size",
    "preprocess",
    "read_image",
    "read_picture",
]
