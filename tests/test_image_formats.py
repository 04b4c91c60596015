"""Files that Pillow does not read by itself: each is called by its name, with what to do."""

from __future__ import annotations

import io
import sys
import types
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from edgevlm.errors import ImageError
from edgevlm.image import read_image

if TYPE_CHECKING:
    from typing_extensions import Unpack

RGB = np.zeros((32, 48, 3), np.uint8)
RGB[:, 24:] = (250, 120, 10)


def ftyp(brand: bytes, compatible: bytes = b"") -> bytes:
    body = b"ftyp" + brand + b"\0\0\0\0" + compatible
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\0\x08mdat"


KINDS: dict[str, tuple[bytes, Unpack[tuple[str, ...]]]] = {
    "iPhone's HEIC": (ftyp(b"heic", b"mif1heic"), "HEIC", "edgevlm[heif]", "pillow-heif"),
    "another HEIF": (ftyp(b"mif1", b"mif1heic"), "HEIC", "edgevlm[heif]"),
    "a burst of HEIC": (ftyp(b"hevc", b"msf1hevc"), "HEIC", "edgevlm[heif]"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "render it to PNG"),
    "SVG with everything before it": (
        b"\n<?xml version='1.0'?>\n<!-- made\nby hand -->\n<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG' "
        b"'x.dtd'>\n<svg width='9'>", "SVG"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "PDF", "render its page"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "web page"),
    "HTML without a doctype": (b"\r\n<HTML lang=en>", "web page"),
    "MP4": (ftyp(b"isom", b"mp42"), "video", "take a frame"),
    "QuickTime": (ftyp(b"qt  "), "video"),
    "WebM": (b"\x1a\x45\xdf\xa3\x9fB\x86\x81", "video"),
    "AVI": (b"RIFF\x10\0\0\0AVI LIST", "video"),
    "a camera's raw file": (ftyp(b"crx ", b"isom"), "raw file", "develop it"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f", "JPEG XL"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    "ZIP": (b"PK\x03\x04\x14\0", "archive"),
    "gzip": (b"\x1f\x8b\x08\0", "archive"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS", "git lfs pull"),
    "JSON": (b'{"error": "not found"}', "JSON"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "a data URL as bytes": (b"data:image/png;base64,iVBORw0KGgo=", "data URL", "as a str"),
    "a web page with a mark before it": (b"\xef\xbb\xbf <html>", "web page"),
    "words": (b"hello", "not a picture in a format that is read here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_picture_is_called_by_its_name(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data, *words = KINDS[kind]
    with pytest.raises(ImageError) as caught:
        read_image(data)
    assert str(caught.value).isprintable()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("data", [b"<!---->" * 585 + b"<x", b" \n" * 3000, b"\n" * 5000 + b"!"])
def test_no_content_takes_long_to_tell(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a picture in a format"):
        read_image(data)
    with pytest.raises(ImageError):
        read_image(data.decode() * 600)


def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif", reason='needs pip install "edgevlm[heif]"')
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(RGB)).save(buffer, quality=-1)
    data = buffer.getvalue()
    assert np.abs(read_image(data).astype(int) - RGB).max() <= 12
    with pytest.raises(UnidentifiedImageError):  # Nothing was registered for others.
        Image.open(io.BytesIO(data))
    with pytest.raises(ImageError, match="damaged or truncated"):
        read_image(data[: len(data) // 2])


def test_pillow_heif_is_asked_for_heic_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(file: BinaryIO) -> Image.Image:
        asked.append(file.read())
        return Image.fromarray(RGB)

    module = types.SimpleNamespace(HeifImageFile=opened)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    data = ftyp(b"heic", b"mif1heic")
    np.testing.assert_array_equal(read_image(data), RGB)
    with pytest.raises(ImageError, match="video"):
        read_image(ftyp(b"isom"))
    assert asked == [data]
    monkeypatch.setattr(Image, "open", unreadable)
    with pytest.raises(ImageError, match="AVIF"):
        read_image(ftyp(b"mif1", b"avifmiaf"))
    assert asked == [data]


def test_avif_is_read_where_pillow_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if ".avif" in Image.registered_extensions():
        buffer = io.BytesIO()
        Image.fromarray(RGB).save(buffer, "AVIF", quality=100)
        assert np.abs(read_image(buffer.getvalue()).astype(int) - RGB).mean() <= 2
    monkeypatch.setattr(Image, "open", unreadable)
    with pytest.raises(ImageError, match=r"AVIF picture; upgrade Pillow to 11\.3"):
        read_image(ftyp(b"avif", b"avifmif1"))
    with pytest.raises(ImageError, match="AVIF picture"):
        read_image(ftyp(b"mif1", b"avifmiaf"))


def unreadable(_: object, formats: object = None) -> Image.Image:
    raise UnidentifiedImageError("cannot identify image file")
