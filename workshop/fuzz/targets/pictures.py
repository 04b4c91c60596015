"""Files of pictures in every format that Pillow writes, damaged: each is read or refused."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image

from edgevlm.image import picture_size, read_picture
from edgevlm.image.read import MAX_PIXELS
from workshop.fuzz.mutate import damaged
from workshop.fuzz.outcomes import Wrong
from workshop.fuzz.samples import PICTURE

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
# Files that begin so make Pillow try a reader that it has no writer for.
_HEADS = (
    b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x20\0\0\0\x20\0\x08\0\3",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    b"\0\0\2\0\1\0\x10\x10\0\0\0\0\1\0\x20\0\x40\0\0\0\x16\0\0\0",
    b'/* XPM */\n"8 8 1 1",\n"a c #000000",\n',
    b"#define x_width 16\n#define x_height 16\nstatic char x[] = {0x01, 0x02};",
    b"qoif\0\0\0\x10\0\0\0\x10\4\0",
    b"\x01\xda\1\1\0\3\0\x10\0\x10\0\3",
    *(b"\xd7\xcd\xc6\x9a\0\0", b"GRIB", b"BUFR", b"\x89HDF\r\n\x1a\n", b"BLP2", b"DDS |\0\0\0"),
    *(
        b"SIMPLE  =                    T",
        b"icns",
        b"\x0a\5\1\x08",
        b"\xb1\x68\xde\x3a",
        b"P7 332\n",
    ),
    *(
        b"\x59\xa6\x6a\x95",
        b"FTEX",
        b"\x12\xaf",
        b"Pf\n10 10\n-1.0\n",
        b"P6 10 10 255\n",
        b"PCD_IPI",
    ),
)


class Fuzzed:
    """The reader of pictures."""

    def __init__(self, folder: Path) -> None:
        Image.init()
        self._seeds: list[bytes] = list(_HEADS)
        for form in sorted(Image.SAVE):
            for mode in _MODES:
                self._seeds += _saved(form, mode)

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        seed = rng.choice(self._seeds)
        if rng.random() < 0.05:
            return _bomb(rng)
        if rng.random() < 0.1:
            seed += rng.randbytes(rng.choice((1, 40, 3000)))
        return damaged(seed, rng, rng.choice((None, 60, 400)))

    def check(self, data: bytes) -> None:
        """See Target."""
        picture = read_picture(data)
        height, width, channels = picture.rgb.shape
        if channels != 3 or height * width > MAX_PIXELS:
            raise Wrong(f"a picture {picture.rgb.shape}")
        if picture_size(data) != (width, height):
            raise Wrong(f"{picture_size(data)} and not {(width, height)}")


def _saved(form: str, mode: str) -> list[bytes]:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PICTURE.convert(mode).save(buffer, form)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # It has no such pictures.
    return [buffer.getvalue()]


def _bomb(rng: random.Random) -> bytes:
    """A small file that says it is a large picture."""
    side = rng.choice((9_000, 10_000, 30_000, 2**31 - 1, 2**32 - 1))
    header = struct.pack(
        ">IIBBBBB", side, rng.choice((1, side)), rng.choice((1, 8, 16)), 2, 0, 0, 0
    )
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(rng.choice((10, 1 << 20)))))]
    chunks += [(b"iCCP", b"x\0\0" + zlib.compress(bytes(50 << 20))), (b"IEND", b"")][
        rng.randrange(2) :
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
