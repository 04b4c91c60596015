"""Search in one's own pictures: what a folder holds, as rows of a dual encoder in one file."""

from edgevlm.photos.index import PhotoIndex
from edgevlm.photos.store import FoundPhoto

__all__ = ["FoundPhoto", "PhotoIndex"]
