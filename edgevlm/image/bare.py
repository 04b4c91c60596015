"""Files of pictures without what lies beside the pixels.

Pillow reads colour profiles, texts and other tags when it opens a file, and refuses the picture
where they are damaged or too large. Without them it is read; where the file says which way is up,
that is kept.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 274
# Sizes, coding, strips and tiles, colours; the rest of TIFF's tags describes the picture in words.
_TIFF_TAGS = {
    *(256, 257, 258, 259, 262, 266, 273, _ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 334, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521),
    *(529, 530, 531, 532),
}
_TIFF_SHORT, _TIFF_LONG = 3, 4


def without_metadata(data: bytes) -> bytes | None:
    """The same picture in a file of only pixels; None where that is not known of its format."""
    try:
        if data.startswith(_PNG):
            return _PNG + b"".join(_png_chunks(data))
        if data.startswith(b"\xff\xd8\xff"):
            return b"\xff\xd8" + b"".join(_jpeg_segments(data))
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff(data)
    except (struct.error, IndexError, OverflowError):
        pass  # Cut off where its parts are listed.
    return None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The critical chunks, whose first letter is a capital, and EXIF that is as it was written."""
    at = len(_PNG)
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunk = data[at : at + 12 + size]
        crc = struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if not chunk[4] & 0x20 or (chunk[4:8] == b"eXIf" and chunk[-4:] == crc):
            yield chunk
        at += 12 + size


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """All but the applications' segments and comments; Adobe's says what the colours are."""
    at = 2
    while data[at + 1] != 0xDA:  # The scan, and with it the pixels.
        if data[at] != 0xFF:
            break
        if data[at + 1] == 0xFF:
            at += 1
            continue
        (size,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + size]
        beside = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE
        if not beside or segment[4:9] == b"Adobe" or segment[4:10] == b"Exif\0\0":
            yield segment
        at += 2 + size
    yield data[at:]


def _tiff(data: bytes) -> bytes:
    """The first directory with only the tags that the pixels need, and none after it."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    counted, entry = (order + "Q", 20) if big else (order + "H", 12)
    (n,) = struct.unpack_from(counted, data, at)
    start = at + struct.calcsize(counted)
    entries = [data[i : i + entry] for i in range(start, start + min(n, 4096) * entry, entry)]
    kept = [e for e in entries if _needed(e, order, big)]
    directory = struct.pack(counted, len(kept)) + b"".join(kept) + bytes(8 if big else 4)
    return data[:at] + directory + data[at + len(directory) :]


def _needed(entry: bytes, order: str, big: bool) -> bool:
    tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), entry)
    # A number that stands in the entry itself, not elsewhere in the file.
    inside = kind in (_TIFF_SHORT, _TIFF_LONG) and count == 1
    return tag in _TIFF_TAGS and (tag != _ORIENTATION or inside)
