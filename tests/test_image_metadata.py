"""What lies beside the pixels of a file, and PIL images from callers, whatever their state."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from edgevlm.errors import ImageError
from edgevlm.image import read_image

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
TURNED = np.rot90(RGB, -1)
PICTURE = Image.fromarray(RGB)
EXIF = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, 6, 0, 0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(format: str, picture: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, crc: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*before: bytes, after: bytes = b"", picture: Image.Image = PICTURE) -> bytes:
    """A PNG with further chunks before its pixels and behind them."""
    data = encoded("PNG", picture)
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(before) + data[at:-12] + after + data[-12:]


def jpeg(*segments: tuple[int, bytes], trailer: bytes = b"") -> bytes:
    data = encoded("JPEG", subsampling=0, quality=100)
    inserted = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    return data[:2] + inserted + data[2:] + trailer


def webp(**chunks: bytes) -> bytes:
    data = encoded("WEBP", lossless=True, icc_profile=b"ICC!", exif=b"EXIF", xmp=b"XMP!")
    parts, at = [], 12
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        kind, content = data[at : at + 4], data[at + 8 : at + 8 + size]
        content = chunks.get(kind.decode().strip(), content)
        padded = content + bytes(len(content) % 2)
        parts.append(kind + struct.pack("<I", len(content)) + padded)
        at += 8 + size + size % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(
    tag: int, kind: int, count: int, value: bytes, big: bool = False, following: int = 0
) -> bytes:
    """A TIFF whose directory has one more tag, as damaged as it is given, and one after it."""
    head, entry, wide = ("<2sHHHQ", "<HHQ", 8) if big else ("<2sHI", "<HHI", 4)
    start, pixels = struct.calcsize(head), RGB.tobytes()
    bits = start + len(pixels)
    at = bits + 6
    layout = (43, 8, 0, at) if big else (42, at)
    entries = [
        struct.pack(entry, t, k, n) + v.to_bytes(wide, "little")
        for t, k, n, v in (
            (256, 3, 1, 20), (257, 3, 1, 12), (258, 3, 3, 8 * 0x100010001 if big else bits),
            (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, start), (277, 3, 1, 3), (278, 3, 1, 12),
            (279, 4, 1, len(pixels)),
        )
    ]  # fmt: skip
    entries.append(struct.pack(entry, tag, kind, count) + value.ljust(wide, b"\0")[:wide])
    entries.sort(key=lambda e: struct.unpack_from("<H", e))
    listed = len(entries).to_bytes(8 if big else 2, "little") + b"".join(entries)
    directory = listed + following.to_bytes(wide, "little")
    return struct.pack(head, b"II", *layout) + pixels + b"\x08\0" * 3 + directory


BOMB = zlib.compress(bytes(2 << 20))
BESIDE = {
    "png: EXIF of four letters": png(chunk(b"eXIf", b"XXXX\0\0\0\x08")),
    "png: empty EXIF": png(chunk(b"eXIf", b"")),
    "png: EXIF whose tags lie nowhere": png(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "png: EXIF with a wrong checksum": png(chunk(b"eXIf", EXIF, crc=1)),
    "png: EXIF after the pixels": png(after=chunk(b"eXIf", b"II*")),
    "png: EXIF in hexadecimal that is none": png(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\nxyz"))
    ),
    "png: text too large": png(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "png: international text too large": png(chunk(b"iTXt", b"XML\0\1\0\0\0" + BOMB)),
    "png: text too large after the pixels": png(after=chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "png: many texts": png(*[chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1 << 20)))] * 70),
    "png: text of an unknown compression": png(chunk(b"zTXt", b"Comment\0\7xx")),
    "png: profile too large": png(chunk(b"iCCP", b"ICC\0\0" + BOMB)),
    "png: profile of an unknown compression": png(chunk(b"iCCP", b"ICC\0\7xx")),
    "png: profile that is none": png(chunk(b"iCCP", b"no end")),
    "png: gamma cut": png(chunk(b"gAMA", b"\0")),
    "png: resolution cut": png(chunk(b"pHYs", b"\0\0\0")),
    "png: chromaticities cut": png(chunk(b"cHRM", b"\0\0\0")),
    "png: no rendering intent": png(chunk(b"sRGB", b"")),
    "png: animation cut": png(chunk(b"acTL", b"\0")),
    "png: frames out of order": png(chunk(b"acTL", b"\0\0\0\2" * 2), chunk(b"fcTL", b"\7" * 26)),
    "png: a private chunk with a wrong checksum": png(chunk(b"prVt", b"x", crc=1)),
    "png: garbage after its end": png() + b"garbage" * 99,
    "webp: EXIF that is none": webp(EXIF=b"Exif\0\0XXXXXXXX"),
    "webp: empty EXIF": webp(EXIF=b""),
    "webp: profile that is none": webp(ICCP=b"\xff" * 200),
    "webp: XMP that is no text": webp(XMP=b"\xff\xfe<x:xmpmeta"),
    "tiff: a profile that lies nowhere": tiff(34675, 7, 4000, b"\xff\xff\xff\x7f"),
    "tiff: EXIF that lies nowhere": tiff(34665, 4, 1, b"\xff\xff\xff\x7f"),
    "tiff: EXIF of a wrong type": tiff(34665, 2, 4, b"abc"),
    "tiff: a place that is no offset": tiff(34853, 12, 1, b"\0\0\0\0"),
    "tiff: XMP of numbers": tiff(700, 3, 2, b"\1\0\2\0"),
    "tiff: XMP of a number": tiff(700, 4, 1, b"\1\0\0\0"),
    "tiff: a resolution of nothing": tiff(282, 5, 1, b"\0\0\0\0"),
    "tiff: a unit of text": tiff(296, 2, 1, b"x"),
    "tiff: a frame after it that lies nowhere": tiff(270, 2, 2, b"x", following=1 << 31),
    "bigtiff: XMP of numbers": tiff(700, 3, 4, b"\1\0\2\0\3\0\4\0", big=True),
    "tiff: turned by text": tiff(274, 2, 2, b"6\0"),
    "tiff: an orientation that lies nowhere": tiff(274, 5, 1, b"\xff\xff\xff\x7f"),
    "tiff: turned by 9": tiff(274, 3, 1, b"\x09\0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_the_pixels_does_not_matter(case: str) -> None:
    np.testing.assert_array_equal(read_image(BESIDE[case]), RGB)


MPF = b"MPF\0II*\0\x08\0\0\0\x02\0" + struct.pack(
    "<HHI4sHHII", 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2
)
JPEGS = {
    "EXIF that is none": jpeg((0xE1, b"Exif\0\0XXXX\0\0\0\x08")),
    "EXIF cut": jpeg((0xE1, b"Exif\0\0MM\0*")),
    "a profile in pieces that are missing": jpeg((0xE2, b"ICC_PROFILE\0\2\3" + SRGB[:99])),
    "a profile without its numbers": jpeg((0xE2, b"ICC_PROFILE\0")),
    "further frames that are missing": jpeg((0xE2, MPF)),
    "further frames that are none": jpeg((0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
    "Photoshop's resources cut": jpeg((0xED, b"Photoshop 3.0\x008BIM\x03\xed")),
    "no version of JFIF": jpeg((0xE0, b"JFIF\0")),
    "XMP that is no text": jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe")),
    "a comment of nothing": jpeg((0xFE, b"")),
    "garbage after its end": jpeg(trailer=b"\xff\xd8garbage" * 99),
}  # fmt: skip


@pytest.mark.parametrize("case", JPEGS)
def test_what_lies_beside_the_pixels_of_a_jpeg_does_not_matter(case: str) -> None:
    np.testing.assert_array_equal(read_image(JPEGS[case]), read_image(jpeg()))


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"eXIf", EXIF)),
        png(chunk(b"zTXt", b"Comment\0\0" + BOMB), chunk(b"eXIf", EXIF)),
        png(chunk(b"eXIf", EXIF), chunk(b"gAMA", b"\0")),
        webp(EXIF=EXIF, ICCP=b"\0"),
        tiff(274, 3, 1, b"\6\0"),
        tiff(274, 4, 1, b"\6\0\0\0", big=True),
    ],
)
def test_pictures_are_turned_although_something_else_is_damaged(data: bytes) -> None:
    np.testing.assert_array_equal(read_image(data), TURNED)


def test_a_jpeg_keeps_its_orientation_and_colours_although_its_head_is_damaged() -> None:
    damaged = (0xE0, b"JFIF\0")
    data = jpeg(damaged, (0xE1, b"Exif\0\0" + EXIF))
    np.testing.assert_array_equal(read_image(data), np.rot90(read_image(jpeg()), -1))
    # Numbered components are RGB where Adobe's segment says so.
    whole = bytearray(encoded("JPEG", keep_rgb=True, quality=100))
    for start, step in ((whole.index(b"\xff\xc0") + 10, 3), (whole.index(b"\xff\xda") + 5, 2)):
        whole[start : start + 3 * step : step] = b"\1\2\3"
    with_it = whole[:2] + b"\xff\xe0\0\x07JFIF\0" + whole[2:]
    assert np.abs(read_image(whole).astype(int) - RGB).max() <= 3
    np.testing.assert_array_equal(read_image(with_it), read_image(whole))


def exif_of(kind: int, value: bytes, count: int = 1) -> bytes:
    value = value.ljust(4, b"\0")
    return struct.pack(">2sHIHHHI", b"MM", 42, 8, 1, 274, kind, count) + value + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        exif_of(3, b"\0\0"),
        exif_of(3, b"\0\x09"),
        exif_of(3, b"\xff\xff"),
        exif_of(2, b"6\0", 2),
        exif_of(7, b"\6"),
        exif_of(5, b"\xff\xff\xff\xf0"),
        exif_of(99, b"\0\6"),
        exif_of(3, b"\0\0\xff\xf0", 1 << 20),
    ],
)
def test_orientations_that_are_none_turn_nothing(exif: bytes) -> None:
    np.testing.assert_array_equal(read_image(png(chunk(b"eXIf", exif))), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_all_orientations_turn_as_pillow_turns(orientation: int, format: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_image(data), np.array(expected))
    np.testing.assert_array_equal(read_image(Image.open(io.BytesIO(data))), np.array(expected))


def damaged() -> Iterator[bytes]:
    """Files whose pixels are damaged, however the rest is."""
    whole = png(chunk(b"gAMA", b"\0"))
    yield whole[:-60]
    yield whole.replace(b"IDAT", b"IDAX")
    at = whole.index(b"IDAT")
    yield whole[: at + 40] + bytes(20) + whole[at + 60 :]
    yield jpeg()[:400]
    yield jpeg((0xE1, b"Exif\0\0XXXX"))[:400]
    yield encoded("TIFF")[:300]
    yield encoded("TIFF")[:6]
    yield encoded("WEBP", lossless=True)[:-80]
    yield encoded("GIF")[:200]
    yield b"\xff\xd8\xff"
    yield b"\x89PNG\r\n\x1a\n"
    yield b"II*\0\xff\xff\xff\xff"
    yield b"MM\0+\0\x08\0\0" + b"\xff" * 8


@pytest.mark.fault("Pictures", "a picture cut short or damaged", "refused in one line")
@pytest.mark.parametrize("data", list(damaged()))
def test_damaged_pixels_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"damaged or truncated|not a picture in a format") as e:
        read_image(data)
    assert str(e.value).isprintable()


def test_pythons_warnings_as_errors_change_nothing() -> None:
    data = jpeg((0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x09\1\x12"))
    expected = read_image(jpeg())
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        Image.open(io.BytesIO(data)).getexif()
    np.testing.assert_array_equal(read_image(data), expected)
    np.testing.assert_array_equal(read_image(lazily(data)(None)), expected)


def closed_file(tmp_path: Path) -> Image.Image:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with path.open("rb") as file:
        return Image.open(file)


def closed_image(tmp_path: Path) -> Image.Image:
    picture = Image.open(io.BytesIO(png()))
    picture.close()
    return picture


def closed_after_loading(tmp_path: Path) -> Image.Image:
    picture = PICTURE.copy()
    picture.close()
    return picture


def lazily(data: bytes) -> Callable[[object], Image.Image]:
    def opened(_: object) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))

    return opened


IDAT = png().index(b"IDAT")
UNREADABLE: dict[str, Callable[[Path], Image.Image]] = {
    "a closed file": closed_file,
    "a closed image": closed_image,
    "an image closed after loading": closed_after_loading,
    "a truncated PNG": lazily(png()[:-60]),
    "a PNG with a wrong checksum": lazily(png()[: IDAT + 40] + b"XXXX" + png()[IDAT + 44 :]),
    "a PNG with a damaged chunk after its pixels": lazily(png(after=chunk(b"pHYs", b"\0"))),
    "a truncated JPEG": lazily(jpeg()[:-200]),
    "a truncated TIFF": lazily(encoded("TIFF")[:-100]),
    "a picture of no pixels": lambda tmp_path: Image.new("RGB", (0, 5)),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_pil_images_that_cannot_be_decoded(case: str, tmp_path: Path) -> None:
    picture = UNREADABLE[case](tmp_path)
    with pytest.raises(ImageError, match="^the PIL image: ") as caught:
        read_image(picture)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_errors_of_any_kind_are_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (SyntaxError("x"), struct.error("x"), zlib.error("x"), EOFError(), IndexError("x"),
                  NotImplementedError("x"), AssertionError(), ZeroDivisionError("x")):  # fmt: skip
        picture = PICTURE.copy()

        def load(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(picture, "load", load)
        with pytest.raises(ImageError, match="the PIL image: cannot be decoded"):
            read_image(picture)


def test_large_pil_images_are_refused_like_files() -> None:
    with pytest.raises(ImageError, match="the PIL image: .* scale it down"):
        read_image(Image.new("1", (10_000, 9_000)))


def with_alpha(mode: str) -> Image.Image:
    picture = PICTURE.convert(mode.replace("a", "A") if mode in ("La", "RGBa") else mode)
    picture.putalpha(Image.fromarray(np.full(RGB.shape[:2], 255, np.uint8)))
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "RGBa", "HSV", "YCbCr", "LAB", "CMYK"])
def test_colour_modes(mode: str) -> None:
    picture = with_alpha(mode) if mode in ("RGBA", "RGBa") else None
    if picture is None and mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        picture = ImageCms.applyTransform(PICTURE, transform)
    rgb = read_image(picture or PICTURE.convert(mode))
    assert np.abs(rgb.astype(int) - RGB).max() <= 20


@pytest.mark.parametrize("mode", ["L", "LA", "La"])
def test_grey_modes(mode: str) -> None:
    grey = np.array(PICTURE.convert("L"))
    picture = with_alpha(mode) if mode != "L" else PICTURE.convert("L")
    np.testing.assert_array_equal(read_image(picture), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("mode", ["P", "PA"])
@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palettes_keep_their_colours_under_transparency(
    mode: str, transparency: int | bytes | None
) -> None:
    picture = PICTURE.quantize(16)
    expected = np.array(picture.convert("RGB"))
    picture = picture.convert(mode) if mode == "PA" else picture
    if transparency is not None:
        picture.info["transparency"] = transparency
    np.testing.assert_array_equal(read_image(picture), expected)
    if mode == "P":
        np.testing.assert_array_equal(read_image(encoded("PNG", picture)), expected)


def test_black_and_white() -> None:
    bits = RGB[..., 0] > 127
    for picture in (Image.fromarray(bits), Image.fromarray(~bits).convert("1")):
        seen = read_image(picture)
        assert set(np.unique(seen)) == {0, 255}


def test_reading_a_pil_image_leaves_its_orientation(tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(png(chunk(b"eXIf", EXIF))))
    np.testing.assert_array_equal(read_image(picture), TURNED)
    np.testing.assert_array_equal(read_image(picture), TURNED)
    assert picture.size == (20, 12) and picture.getexif()[274] == 6


def test_a_fraction_is_an_orientation() -> None:
    picture = PICTURE.copy()
    picture.getexif()[274] = TiffImagePlugin.IFDRational(Fraction(6))
    np.testing.assert_array_equal(read_image(picture), TURNED)
    picture.getexif()[274] = [6]
    np.testing.assert_array_equal(read_image(picture), RGB)


def test_texts_of_a_png_may_be_large_for_pillow_alone() -> None:
    data = BESIDE["png: text too large"]
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data))
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20
