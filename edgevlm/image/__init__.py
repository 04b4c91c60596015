"""Pictures: anything a caller has -> RGB uint8 [h, w, 3] -> pixels float32 [3, size, size].

Pillow is the only image library, so an installed package never changes a number.
"""

from edgevlm.image.pixels import Pixels, preprocess
from edgevlm.image.read import MAX_PIXELS, RGB, ImageSource, read_image

__all__ = ["MAX_PIXELS", "RGB", "ImageSource", "Pixels", "preprocess", "read_image"]
