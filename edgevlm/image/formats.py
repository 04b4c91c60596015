"""Formats that Pillow does not read by itself: what bytes look like, and who reads them."""

from __future__ import annotations

import io
import re
from typing import Any

from PIL import Image, UnidentifiedImageError

# Pillow's readers that are on: formats that people keep pictures in. It has others that start a
# program (EPS), that only tell a format, or that nobody has looked at for decades.
FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "DIB", "PPM"),
    *("AVIF", "DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)

_AVIF = rb"....ftyp.{0,40}avi[fs]"
_HEIF = re.compile(rb"(?!%b)....ftyp(?:hei[cxms]|hev[cxms]|mif[12]|msf1)" % _AVIF, re.DOTALL)
_COMMENT = rb"<!--(?:(?!-->).)*-->"
# The beginning of a file, without spaces before it, as a pattern, what it is, and what to do.
_KINDS = (
    (_AVIF, "an AVIF picture; upgrade Pillow to 11.3 or later"),
    (_HEIF.pattern, 'an HEIC picture; pip install "edgevlm[heif]" (pillow-heif) to read it'),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture; convert it to PNG or JPEG"),
    (rb"....ftypcrx |FUJIFILMCCD-RAW", "a camera's raw file; develop it to TIFF or JPEG"),
    (rb"....ftyp|....moov|\x1a\x45\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]|FLV\x01|OggS",
     "a video; name it by --video (/video in a chat), or take a frame of it, as PNG or JPEG"),
    (rb"(?:<\?xml[^>]*>)?(?:\s|%b|<!DOCTYPE svg[^>]*>)*<svg[\s>]" % _COMMENT,
     "an SVG drawing; render it to PNG"),
    (rb"(?:\s|%b)*<(?:!doctype html|html|head|body)\b" % _COMMENT,
     "a web page; name the picture itself (a login or a preview may lie before it)"),
    (rb".{0,1024}%PDF-", "a PDF document; render its page to PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript; render it to PNG"),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a drawing of Windows; render it to PNG"),
    (rb"/\* XPM \*/|#define\s+\S+_width\s", "a picture of X11; convert it to PNG"),
    (rb"SIMPLE  =|\x89HDF\r\n|GRIB|BUFR", "scientific data; convert it to PNG or TIFF"),
    (rb"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive; unpack it"),
    (rb"data:image/", "the text of a data URL; pass it as a str"),
    (rb"<\?xml|[\[{][\s\"{\[]", "a text (XML or JSON), perhaps a server's message"),
)  # fmt: skip
# How base64 of PNG, JPEG, GIF, WebP, TIFF, BMP, HEIC and AVIF begins.
_BASE64_PICTURE = re.compile(
    r"iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA.{2,4}(?:ZnR5c|mdHlw|GZ0eX)"
)
_BASE64 = re.compile(r"[\w+/\r\n-]{40,}={0,2}", re.ASCII)


def looks_like(data: bytes) -> str:
    """The likely format of bytes that Pillow does not read, with the cure; empty if unknown."""
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, kind in _KINDS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return kind
    return "base64 text; decode it" if is_base64(head.decode("latin-1")) else ""


def is_base64(text: str) -> bool:
    """True if a text is a picture in base64 rather than a name."""
    text = text.strip()
    return bool(_BASE64.fullmatch(text)) and (len(text) > 1024 or bool(_BASE64_PICTURE.match(text)))


def open_known(data: bytes) -> Image.Image:
    """A picture in one of FORMATS; raises UnidentifiedImageError for others, and whatever Pillow's
    readers do where it is damaged.
    """
    try:
        # Those that Pillow has without importing all of its readers.
        return Image.open(io.BytesIO(data), formats=FORMATS[:6])
    except UnidentifiedImageError:
        Image.init()
        known = [form for form in FORMATS if form in Image.OPEN]
        return Image.open(io.BytesIO(data), formats=known)


def open_heif(data: bytes) -> Image.Image | None:
    """An HEIC picture, opened by pillow-heif; None for other data, or where that is missing."""
    if not _HEIF.match(data):
        return None
    try:
        import pillow_heif
    except ImportError:
        return None
    # Pillow itself learns nothing: what other code opens stays as it was.
    opener: Any = pillow_heif.HeifImageFile
    picture: Image.Image = opener(io.BytesIO(data))
    return picture
