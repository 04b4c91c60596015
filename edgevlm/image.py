"""Pictures: anything a caller has -> RGB uint8 [h, w, 3] -> pixels float32 [3, size, size].

Pillow is the only image library, so an installed package never changes a number. Decoding applies
the EXIF orientation; alpha is dropped as the original models' code drops it (`convert("RGB")`).
"""

from __future__ import annotations

import io
import math
import os
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edgevlm.errors import ImageError
from edgevlm.specs import Fit, ImageSpec

RGB = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float32]
ImageSource = str | os.PathLike[str] | bytes | Image.Image | RGB

# Pillow's own threshold for a decompression bomb: 256 MiB of RGB.
MAX_PIXELS = 89_478_485
# What a long and narrow picture may become on the way to a square: half a gigabyte, enough for one
# of 1 x 1000 pixels whose short side becomes 336.
MAX_RESIZED = 1 << 27
MAX_DOWNLOAD_BYTES = 128 << 20
_TIMEOUT_S = 30
_STRIP_PIXELS = 1 << 22

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def read_image(source: ImageSource) -> RGB:
    """Reads a picture: a path, an http(s) or data URL, the bytes of a file, a PIL image or an
    array uint8 [h, w, 3]. Returns RGB uint8 [h, w, 3], upright; of an animation the first frame.

    Raises ImageError that names the source and the reason.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, bytes):
        return _decode(source, f"the picture of {len(source)} bytes")
    name = os.fspath(source)
    scheme = urllib.parse.urlsplit(name).scheme.lower()
    if scheme in ("http", "https", "data"):
        return _decode(_download(name), name if scheme != "data" else "the data URL")
    return _decode(_read_file(Path(name)), name)


def _from_array(array: RGB) -> RGB:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(
            f"array {array.dtype} {list(array.shape)}",
            "must be uint8 [height, width, 3]; convert it or pass a PIL image",
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    return np.array(array, order="C")  # its own: callers use a camera's frame again


def _from_pil(picture: Image.Image) -> RGB:
    try:
        return _to_rgb(picture, "the PIL image")
    except OSError as e:  # opened lazily, and its file is damaged or closed
        raise ImageError("the PIL image", f"cannot be decoded ({e})") from None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(str(path), "no such file") from None
    except IsADirectoryError:
        raise ImageError(str(path), "is a folder; name a picture in it") from None
    except (OSError, ValueError) as e:
        raise ImageError(
            str(path), f"cannot be read ({getattr(e, 'strerror', None) or e})"
        ) from None


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as e:
        reason = f"the server answered {e.code} {e.reason}"
        e.close()
        raise ImageError(url, reason) from None
    except (OSError, ValueError) as e:
        cause = getattr(e, "reason", None) or e
        raise ImageError(url[:200], f"cannot be downloaded ({cause})") from None
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError(url, f"is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB")
    return data


def _decode(data: bytes, name: str) -> RGB:
    if not data:
        raise ImageError(name, "is empty")
    try:
        with warnings.catch_warnings():
            # A warning about odd metadata says nothing about the pixels; the size is checked below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as picture:
                return _to_rgb(picture, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, "is not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise ImageError(name, _too_large()) from None
    # Pillow's readers raise many kinds (OSError, SyntaxError, struct.error, ...) on damaged files.
    except Exception as e:
        raise ImageError(name, f"is damaged or truncated ({e})") from None


def _to_rgb(picture: Image.Image, name: str) -> RGB:
    _check_size(*picture.size, name)
    upright = ImageOps.exif_transpose(picture)
    return np.array(_eight_bit(upright).convert("RGB"))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Scales 16-bit and float greys to 8 bits, where Pillow's convert would clip them."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    grey = np.asarray(picture).astype(np.float64)
    top = grey.max(initial=0.0)
    if picture.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0 if top > 255 or picture.mode != "I" else 1.0
    return Image.fromarray(np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8))


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"has {width} x {height} pixels; {_too_large()}")
    if width < 1 or height < 1:
        raise ImageError(name, "has no pixels")


def _too_large() -> str:
    return f"is larger than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down"


def preprocess(rgb: RGB, spec: ImageSpec) -> Pixels:
    """RGB uint8 [h, w, 3] -> pixels float32 [3, size, size], bit for bit as transformers' slow
    processors (4.57: SiglipImageProcessor, CLIPImageProcessor, LlavaImageProcessor): resized as
    8-bit, then scaled in float64, normalised in float32.

    Raises ImageError for a picture so long and narrow that "pad" or "crop" would swell it.
    """
    side = spec.resize or spec.size
    _check_fit(rgb.shape[1], rgb.shape[0], spec.fit, side)
    picture = _middle(_FIT[spec.fit](Image.fromarray(rgb), spec, side), spec.size)
    scaled = (np.asarray(picture).astype(np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def _check_fit(width: int, height: int, fit: Fit, side: int) -> None:
    long = max(width, height)
    # Pillow holds 4 bytes a pixel. A pad has only strips of its square in memory, but goes through
    # every row at full width.
    swollen = {
        "stretch": 0,
        "crop": math.prod(_covering(width, height, side)),
        "pad": max(long * side, long * height // 4),
    }
    if swollen[fit] > MAX_RESIZED:
        raise ImageError(
            f"the picture of {width} x {height} pixels",
            "is too long and narrow for this model; cut out a part of it",
        )


def _stretch(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    return picture.resize((side, side), _RESAMPLE[spec.resample])


def _cover(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    """The picture with a short side of `side`.

    Resizing only its middle (Pillow's `box`) rounds its weights otherwise: not the same pixels.
    """
    return picture.resize(_covering(*picture.size, side), _RESAMPLE[spec.resample])


def _covering(width: int, height: int, side: int) -> tuple[int, int]:
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, as CLIPImageProcessor cuts it out."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _pad(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    """The picture in the middle of a square of one colour, as LLaVA's expand2square, resized.

    Pillow resizes the columns first and rows after that, each rounded to 8 bits, and every row by
    itself: done strip by strip the result is the same, and the square is never in memory.
    """
    width, height = picture.size
    long, resample = max(width, height), _RESAMPLE[spec.resample]
    left, top = (long - width) // 2, (long - height) // 2
    background = spec.fill or tuple(int(x * 255) for x in spec.mean)
    narrow = Image.new("RGB", (side, long), background)
    rows = max(1, _STRIP_PIXELS // long)
    for y in range(0, height, rows):
        n = min(rows, height - y)
        strip = Image.new("RGB", (long, n), background)
        strip.paste(picture.crop((0, y, width, y + n)), (left, 0))
        narrow.paste(strip.resize((side, n), resample), (0, top + y))
    return narrow.resize((side, side), resample)


_FIT = {"stretch": _stretch, "pad": _pad, "crop": _cover}
