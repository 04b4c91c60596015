"""Greys of other depths than 8 bits: the file's depth decides, highlights are clipped."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.image import ImageSource, read_image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
EIGHT = np.rint(RAMP * 255)
FLOAT, SIGNED, UNSIGNED = 3, 2, 1


def encoded(array: NDArray[Any], format: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


def tiff(array: NDArray[Any], photometric: int = 1, bits: int = 0, content: bytes = b"") -> bytes:
    """An uncompressed TIFF of one channel, of any type and byte order that numpy has."""
    order = ">" if array.dtype.byteorder == ">" else "<"
    kind = {"f": FLOAT, "i": SIGNED, "u": UNSIGNED}[array.dtype.kind]
    height, width = array.shape
    content = content or array.tobytes()
    entries = [(256, width), (257, height), (258, bits or array.dtype.itemsize * 8), (259, 1),
               (262, photometric), (273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, height),
               (279, len(content)), (339, kind)]  # fmt: skip
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value)
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return head + directory + bytes(4) + content


def grey(data: ImageSource) -> NDArray[np.int_]:
    rgb = read_image(data)
    np.testing.assert_array_equal(rgb[..., 0], rgb[..., 1])
    return rgb[..., 0].astype(int)


def near(seen: NDArray[Any], expected: NDArray[Any] = EIGHT, by: int = 1) -> None:
    assert np.abs(seen - expected).max() <= by


def test_every_grey_of_16_bits_is_rounded() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for data in (encoded(every, "PNG"), encoded(every), Image.fromarray(every)):
        np.testing.assert_array_equal(grey(data), np.rint(every / 257))


@pytest.mark.parametrize("top", [1.0, 1.02, 255, 1023, 4095, 16383, 65535])
def test_floats_to_any_full_scale(top: float) -> None:
    scene = (RAMP * top).astype(np.float32)
    expected = np.minimum(EIGHT * top / (1 if top < 2 else top), 255)
    near(grey(tiff(scene)), expected)
    near(grey(Image.fromarray(scene)), expected)


@pytest.mark.parametrize("highlight", [1.0001, 1.02, 3.0, 12.0, 400.0, 70_000.0, np.inf])
@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0])
def test_a_highlight_is_clipped_and_darkens_nothing(highlight: float, full: float) -> None:
    scene = (RAMP * full).astype(np.float32)
    scene[3, 3] = highlight * full
    expected = EIGHT.copy()
    expected[3, 3] = 255
    near(grey(tiff(scene)), expected)


@pytest.mark.parametrize("part", [0.05, 0.2])
@pytest.mark.parametrize("highlight", [1.5, 8.0, 300.0])
def test_a_bright_sky_darkens_nothing(part: float, highlight: float) -> None:
    scene = np.tile(np.linspace(0, 1, 100, dtype=np.float32), (100, 1))
    expected = np.rint(scene * 255)
    sky = int(part * 100)
    scene[:sky], expected[:sky] = highlight, 255
    near(grey(tiff(scene)), expected)


def test_dark_and_flat_pictures_stay_as_they_are() -> None:
    near(grey(tiff((RAMP * 0.1).astype(np.float32))), EIGHT * 0.1)
    near(grey(tiff(np.rint(RAMP * 40).astype(np.float32))), np.rint(RAMP * 40))
    for value, seen in ((0.0, 0), (0.5, 128), (1.0, 255), (2.0, 2), (128.0, 128), (255.0, 255)):
        assert np.unique(grey(tiff(np.full((4, 4), value, np.float32)))).tolist() == [seen]


def test_what_is_no_number_is_black_and_negative_too() -> None:
    scene = RAMP.astype(np.float32)
    expected = EIGHT.copy()
    scene[0, 5], scene[1, 1], scene[2, 2] = np.nan, -0.5, -np.inf
    expected[0, 5] = expected[1, 1] = expected[2, 2] = 0
    near(grey(tiff(scene)), expected)
    assert np.unique(grey(tiff(np.full((4, 4), np.nan, np.float32)))).tolist() == [0]


def test_drawings_on_black_in_0_to_255() -> None:
    scene = np.zeros((28, 28), np.float32)
    scene[10:14, 10:20] = np.linspace(20.5, 255, 40, dtype=np.float32).reshape(4, 10)
    near(grey(tiff(scene)), scene)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_floats_of_either_byte_order_and_polarity(order: str, photometric: int) -> None:
    seen = grey(tiff(RAMP.astype(order + "f4"), photometric))
    near(seen if photometric else 255 - seen)


def test_unsigned_integers_by_the_files_bits() -> None:
    near(grey(tiff(np.rint(RAMP * 65535).astype("<u2"))))
    near(grey(tiff(np.rint(RAMP * 65535).astype(">u2"))))
    near(255 - grey(tiff(np.rint(RAMP * 65535).astype("<u2"), photometric=0)))
    # Of a dark picture of 16 bits nothing says that it had only 8 or 12.
    near(grey(tiff(np.rint(RAMP * 255).astype("<u2"))), EIGHT / 257)
    near(grey(tiff(np.rint(RAMP * 4095).astype("<u2"))), np.rint(RAMP * 16))


def test_twelve_bits_that_the_file_has_as_twelve() -> None:
    values = np.rint(RAMP * 4095).astype(int).ravel()
    bits = "".join(f"{v:012b}" for v in values)
    content = int(bits, 2).to_bytes(len(bits) // 8, "big")
    near(grey(tiff(np.zeros((8, 8), "<u2"), bits=12, content=content)))


@pytest.mark.parametrize("kind", ["<i2", ">i2"])
def test_signed_integers_of_16_bits(kind: str) -> None:
    near(grey(tiff(np.rint(RAMP * 32767).astype(kind))))
    near(grey(tiff((np.rint(RAMP * 65535) - 32768).astype(kind))))


def test_signed_integers_of_8_bits() -> None:
    near(grey(tiff(np.rint(RAMP * 127).astype("<i1"))))
    near(grey(tiff((np.rint(RAMP * 255) - 128).astype("<i1"))))


@pytest.mark.parametrize("top", [255, 65535, 100_000, 2**31 - 1])
@pytest.mark.parametrize("kind", ["<i4", ">i4", "<u4"])
def test_integers_of_32_bits_by_their_values(top: int, kind: str) -> None:
    values = np.rint(RAMP * top)
    near(grey(tiff(values.astype(kind))), EIGHT, 6)
    if kind == "<i4":
        near(grey(Image.fromarray(values.astype(kind))), EIGHT, 6)
        values[4, 4] = 2**31 - 1
        seen = grey(Image.fromarray(values.astype(kind)))
        assert len(np.unique(seen)) > 50 and np.median(seen) > 100


def test_unsigned_integers_above_what_pillow_holds() -> None:
    near(grey(tiff(np.rint(RAMP * (2**32 - 1)).astype("<u4"))), EIGHT, 6)


def test_masks_of_0_and_1_are_seen() -> None:
    mask = (RAMP > 0.5).astype(np.int32)
    assert np.unique(grey(Image.fromarray(mask))).tolist() == [0, 255]


@pytest.mark.parametrize("maxval", [1, 7, 15, 100, 255, 256, 1000, 1023, 4095, 65534, 65535])
@pytest.mark.parametrize("plain", [True, False])
def test_pgm_of_any_largest_value(maxval: int, plain: bool) -> None:
    values = np.rint(RAMP * maxval).astype(int)
    if plain:
        data = f"P2 8 8 {maxval}\n".encode() + " ".join(map(str, values.ravel())).encode() + b"\n"
    else:
        wide = ">u2" if maxval > 255 else "u1"
        data = f"P5 8 8 {maxval}\n".encode() + values.astype(wide).tobytes()
    near(grey(data), np.rint(values / maxval * 255))


def test_a_dark_pgm_of_16_bits_stays_dark() -> None:
    data = b"P5 8 8 65535\n" + np.rint(RAMP * 200).astype(">u2").tobytes()
    assert np.unique(grey(data)).tolist() == [0, 1]


def test_pfm() -> None:
    scene = (RAMP * 1.5).astype("<f4")
    data = b"Pf\n8 8\n-1.0\n" + scene[::-1].tobytes()
    near(grey(data), np.minimum(np.rint(scene * 255), 255))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_pil_images_of_16_bits(mode: str) -> None:
    values = np.rint(RAMP * 65535)
    content = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    near(grey(Image.frombytes(mode, (8, 8), content)))


def test_sixteen_bits_a_colour_are_reduced_by_pillow() -> None:
    ramp = np.rint(RAMP * 65535).astype(">u2")
    rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in ramp)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    near(grey(data))


def test_orientation_and_depth_go_together() -> None:
    picture = Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16))
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", exif=exif)
    near(grey(buffer.getvalue()), np.rot90(EIGHT, -1))
