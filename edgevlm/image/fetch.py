"""The bytes of a picture from where it lies: a file, an open file, a web server."""

from __future__ import annotations

import contextlib
import http.client
import platform
import re
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm.errors import ImageError
from edgevlm.image.urls import Address, one_line, shortened

# More than the largest picture that is decoded takes, uncompressed at 16 bits.
MAX_FILE_BYTES = 1 << 30
MAX_DOWNLOAD_BYTES = 128 << 20
_TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 10


def read_file(path: Path) -> bytes:
    """The content of a file. Raises ImageError."""
    name = shortened(str(path))
    try:
        with path.open("rb") as file:
            return _all(file.read, MAX_FILE_BYTES, name)
    except FileNotFoundError:
        collapsed = re.match(r"https?:[/\\]\w", str(path))
        cure = "; a URL is passed as a str, not as a Path" if collapsed else ""
        raise ImageError(name, f"no such file{cure}") from None
    except IsADirectoryError:
        raise ImageError(name, "is a folder; name a picture in it") from None
    except (OSError, ValueError) as e:
        raise ImageError(name, f"cannot be read ({one_line(e)})") from None


def read_stream(stream: Any) -> tuple[bytes, str]:
    """The content of an object with `read`, from its start where it can be rewound, and its name.

    Raises ImageError.
    """
    given = getattr(stream, "name", None)
    name = f"the open file {shortened(given)}" if isinstance(given, str) else "the open file"
    try:
        with contextlib.suppress(AttributeError, OSError):  # A pipe begins where it is.
            stream.seek(0)
        return _all(stream.read, MAX_FILE_BYTES, name), name
    except ImageError:
        raise
    # A stream may be anybody's: of a cloud's client, an archive, a closed file (ValueError).
    except Exception as e:
        raise ImageError(name, f"cannot be read ({one_line(e)})") from e


def own_handlers() -> list[urllib.request.BaseHandler]:
    """Handlers of connections as curl makes them: to any address, by the environment's proxies."""
    names = ("ProxyHandler", "HTTPHandler", "HTTPSHandler")
    return [getattr(urllib.request, name)() for name in names]


def download(
    url: str,
    handlers: Callable[[], Sequence[urllib.request.BaseHandler]] = own_handlers,
    limit: int | None = None,
) -> tuple[bytes, str]:
    """Downloads a http or https URL, redirects followed: the body, and its name for messages.

    `handlers` make each connection. Raises ImageError, also for a body of more than `limit` bytes,
    MAX_DOWNLOAD_BYTES where that is None.
    """
    first = address = Address.of(url)
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            with _open(address, handlers()) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or not location:
                    most = limit or MAX_DOWNLOAD_BYTES
                    return _body(response, most, first.shown), first.shown
            address = address.follow(location)
    except (OSError, ValueError, http.client.HTTPException, zlib.error) as e:
        raise ImageError(first.shown, f"cannot be downloaded ({one_line(e)})") from None
    raise ImageError(first.shown, f"redirects more than {_MAX_REDIRECTS} times")


def user_agent() -> str:
    """edgevlm's User-Agent header."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"edgevlm/{metadata.version('edgevlm')} Python-urllib/{python}"


def _open(address: Address, handlers: Sequence[urllib.request.BaseHandler]) -> Any:
    """The server's response, whatever its status."""
    opener = urllib.request.OpenerDirector()
    # Without the handlers of errors, redirects and other schemes, which are decided on here.
    for handler in (urllib.request.UnknownHandler(), *handlers):
        opener.add_handler(handler)
    headers = {"User-Agent": user_agent(), "Accept": "*/*"}
    if address.authorization:
        headers["Authorization"] = address.authorization
    return opener.open(urllib.request.Request(address.url, headers=headers), timeout=_TIMEOUT_S)


def _body(response: Any, limit: int, name: str) -> bytes:
    if not 200 <= response.status < 300:
        answered = f"{response.status} {shortened(response.reason or '')}".rstrip()
        raise ImageError(name, f"the server answered {answered}")
    data = _all(response.read, limit, name)
    # http.client reports a body that ends early only where it is read at once.
    if response.length:
        raise ImageError(
            name,
            f"cannot be downloaded (the server broke off after {len(data)} of "
            f"{len(data) + response.length} bytes)",
        )
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _inflated(data, limit, name)
    if encoding not in ("", "identity"):
        raise ImageError(name, f"cannot be downloaded (encoded as {shortened(encoding)})")
    return data


def _inflated(data: bytes, limit: int, name: str) -> bytes:
    """gzip or zlib, although nothing of the kind was asked for."""
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    content = stream.decompress(data, limit + 1)
    if len(content) > limit:
        raise ImageError(name, f"is larger than {limit >> 20} MiB")
    if not stream.eof:
        raise ImageError(name, "cannot be downloaded (its compressed content is truncated)")
    return content


def _all(read: Callable[[int], Any], limit: int, name: str) -> bytes:
    """Everything that `read` gives, up to `limit` bytes."""
    blocks, size = [], 0
    while block := read(_BLOCK_BYTES):
        if not isinstance(block, (bytes, bytearray)):
            raise ImageError(name, 'does not give bytes; open it with mode "rb"')
        size += len(block)
        if size > limit:
            raise ImageError(name, f"is larger than {limit >> 20} MiB")
        blocks.append(block)
    return b"".join(blocks)
