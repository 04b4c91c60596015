"""Anything that names or holds a picture -> RGB uint8 [h, w, 3], upright, and its transparency.

The EXIF orientation is applied. What lies beside the pixels never decides whether a picture is
read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from edgevlm.errors import ImageError
from edgevlm.image.bare import without_metadata
from edgevlm.image.depth import eight_bit
from edgevlm.image.fetch import download, read_file, read_stream
from edgevlm.image.formats import is_base64, looks_like, open_heif, open_known
from edgevlm.image.names import located
from edgevlm.image.urls import data_url_bytes, one_line, shortened

RGB = npt.NDArray[np.uint8]
ImageSource = (
    str
    | os.PathLike[str]
    | os.PathLike[bytes]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | RGB
)
T = TypeVar("T")

# Pillow's own threshold for a decompression bomb: 256 MiB of RGB.
MAX_PIXELS = 89_478_485
_NO_ROOM = "does not fit into memory; scale it down"
# How a picture is turned to be seen upright, by its EXIF orientation.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [turn for orientation, turn in _TURNS.items() if orientation in (5, 6, 7, 8)]
# Modes with premultiplied alpha, which Pillow converts to RGB only by these.
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}


@dataclass(frozen=True)
class Picture:
    """A picture that was read, its own copy: `rgb` uint8 [h, w, 3], upright, and what most models
    do without: `alpha` uint8 [h, w] where it has transparency (255 is opaque), and whether its file
    holds the indices of a palette or greys (`indexed`). `file` is the content of the file that it
    was read from, where it was one.
    """

    rgb: RGB
    alpha: npt.NDArray[np.uint8] | None = None
    indexed: bool = False
    file: bytes | None = field(default=None, compare=False, repr=False)


def read_image(source: ImageSource) -> RGB:
    """Reads a picture as RGB uint8 [h, w, 3] without its transparency, as `convert("RGB")` drops
    it; see `read_picture`.
    """
    return read_picture(source).rgb


def read_picture(source: ImageSource) -> Picture:
    """Reads a picture: a path, an http(s), data or file URL, the bytes of a file, a file opened
    with "rb", a PIL image or an array uint8 [h, w, 3]. Of an animation it is the first frame.

    A text is read as a terminal or a file manager writes a name, too: quoted, with backslashes
    before spaces, with `~`. A file of exactly that name wins.

    Raises ImageError that names the source and the reason.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _read(data, f"the picture of {len(data)} bytes")
    if isinstance(source, str):
        return _from_name(source)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _read(read_file(Path(path)), shortened(path))
    if hasattr(source, "read"):
        return _read(*read_stream(source))
    raise ImageError(
        f"an object of type {type(source).__name__}",
        "is not a picture; pass a path, a URL, bytes, an open file, a PIL image or an array",
    )


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of the picture in a file's bytes, upright, without decoding it.

    Raises ImageError for bytes that are no picture.
    """
    return _decode(data, f"the picture of {len(data)} bytes", _upright_size)


def _from_name(name: str) -> Picture:
    if not name.strip():
        raise ImageError("the picture's name", "is empty; name a file or a URL")
    found = located(name)
    if isinstance(found, Path):
        if is_base64(name) and not os.path.exists(found):
            raise ImageError(
                f"a text of {len(name)} characters",
                "is base64, not a name; decode it to bytes, or put data:image/png;base64, before "
                "it",
            )
        return _read(read_file(found), shortened(str(found)))
    if found[:5].lower() == "data:":
        return _read(data_url_bytes(found), "the data URL")
    return _read(*download(found))


def _read(data: bytes, name: str) -> Picture:
    """The picture in a file's bytes, which it keeps."""
    return replace(_decode(data, name, _converted), file=data)


def _from_array(array: RGB) -> Picture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(
            f"array {array.dtype} {list(array.shape)}",
            "must be uint8 [height, width, 3]; convert it or pass a PIL image",
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    return Picture(np.array(array, order="C"))  # its own: callers use a camera's frame again


def _from_pil(picture: Image.Image) -> Picture:
    name = "the PIL image"
    try:
        return _converted(picture, name)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(name, _NO_ROOM) from None
    # Opened lazily, its file may be damaged or closed, which Pillow's readers tell in many kinds.
    except Exception as e:
        raise ImageError(name, f"cannot be decoded ({one_line(e)})") from None


def _decode(data: bytes, name: str, use: Callable[[Image.Image, str], T]) -> T:
    """Opens the picture in a file's bytes and passes it to `use`; raises ImageError."""
    if not data:
        raise ImageError(name, "is empty")
    try:
        return _opened(data, name, use)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(name, _too_large()) from None
    except MemoryError:
        raise ImageError(name, _NO_ROOM) from None
    # Pillow's readers raise many kinds (OSError, SyntaxError, struct.error, ...) on damaged files.
    except Exception as e:
        refused = e
    bare = without_metadata(data)
    if bare is not None:
        try:
            return _opened(bare, name, use)
        except ImageError:
            raise
        except Exception:  # The pixels themselves are damaged: the first error says how.
            pass
    if isinstance(refused, UnidentifiedImageError):
        kind = looks_like(data)
        unknown = "is not a picture in a format that is read here; PNG and JPEG are"
        raise ImageError(name, f"looks like {kind}" if kind else unknown)
    raise ImageError(name, f"is damaged or truncated ({one_line(refused)})")


def _opened(data: bytes, name: str, use: Callable[[Image.Image, str], T]) -> T:
    with _quiet():
        try:
            picture: Image.Image = open_known(data)
        except UnidentifiedImageError:
            heif = open_heif(data)
            if heif is None:
                raise
            picture = heif
        with picture:
            return use(picture, name)


def _converted(picture: Image.Image, name: str) -> Picture:
    _check_size(*picture.size, name)
    with _quiet():
        picture.load()
        turn = _turn(picture)
        shallow = eight_bit(picture)
        if shallow.mode in _STRAIGHT:
            shallow = shallow.convert(_STRAIGHT[shallow.mode])
        bands = [shallow.convert("RGB")]
        if "A" in shallow.getbands():
            bands.append(shallow.getchannel("A"))
    rgb, *alpha = (np.array(b if turn is None else b.transpose(turn)) for b in bands)
    return Picture(rgb, alpha[0] if alpha else None, shallow.mode in ("P", "L"))


def _upright_size(picture: Image.Image, _: str) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if _turn(picture) in _SIDEWAYS else (width, height)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """The transposition that turns a picture upright; None without a readable EXIF orientation."""
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    # Damaged EXIF is told in as many kinds as damaged pictures, and says nothing of the pixels.
    except Exception:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about odd metadata and large pictures; sizes are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"has {width} x {height} pixels; {_too_large()}")
    if width < 1 or height < 1:
        raise ImageError(name, "has no pixels")


def _too_large() -> str:
    return f"is larger than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down"
