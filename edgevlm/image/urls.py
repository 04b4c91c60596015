"""URLs of pictures as text: what is sent, what may be shown, what a data URL holds.

Knows no network. Credentials and queries are kept apart from the beginning: neither may reach a
message, since both hold passwords and keys.
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from dataclasses import dataclass

from edgevlm.errors import ImageError

_SHOWN = 160
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Signs that browsers and curl send as they are.
_PLAIN = "%!$&'()*+,/:;=@[]~"


@dataclass(frozen=True)
class Address:
    """A picture's address, taken apart for the request.

    `url` is percent-encoded and has no credentials; `authorization` is the header they make, or
    empty; `shown` is how a message names the address.
    """

    url: str
    authorization: str
    shown: str

    @classmethod
    def of(cls, text: str) -> Address:
        """The address that a http or https URL names, as a person or a program wrote it.

        Spaces, other alphabets and international host names are encoded as browsers, curl and
        requests do; what is encoded already stays. Raises ImageError.
        """
        shown = _presentable(text)
        try:
            parts = urllib.parse.urlsplit(text)
            host, port = parts.hostname, parts.port
            if not host:
                raise ImageError(shown, "cannot be downloaded (it names no host)")
            name = f"[{host}]" if ":" in host else _encoded_host(host)
            encoded = urllib.parse.urlunsplit(
                (
                    parts.scheme,
                    name if port is None else f"{name}:{port}",
                    _encoded(parts.path, _PLAIN) or "/",
                    _encoded(parts.query, _PLAIN + "?"),
                    "",
                )
            )
            return cls(encoded, _basic(parts.username, parts.password), shown)
        except ValueError as e:
            # What urllib says of a URL with credentials may quote them.
            reason = "a / or # in a password is written %2F or %23" if "@" in text else one_line(e)
            raise ImageError(shown, f"is not a valid URL ({reason})") from None

    def follow(self, location: str) -> Address:
        """The address that a redirect names; credentials stay with the host they were given for.

        Raises ImageError for anything but http and https.
        """
        # http.client reads headers as Latin-1; servers send UTF-8.
        raw = location.encode("latin-1", "replace").decode("utf-8", "surrogateescape")
        try:
            target = urllib.parse.urljoin(self.url, raw)
            scheme = urllib.parse.urlsplit(target).scheme
        except ValueError as e:
            raise ImageError(self.shown, f"redirects to no valid URL ({one_line(e)})") from None
        if scheme not in ("http", "https"):
            raise ImageError(self.shown, f"redirects to a {scheme}: address, which is not followed")
        there = Address.of(target)
        keep = self._origin() == there._origin() and not there.authorization
        return Address(there.url, self.authorization, there.shown) if keep else there

    def _origin(self) -> tuple[str, str]:
        parts = urllib.parse.urlsplit(self.url)
        return parts.scheme, parts.netloc


def data_url_bytes(text: str) -> bytes:
    """The content of a data URL, in base64 or percent-encoded. Raises ImageError."""
    name = "the data URL"
    kind, comma, content = text.partition(":")[2].partition(",")
    if not comma:
        raise ImageError(name, 'has no comma before its data, as in "data:image/png;base64,..."')
    try:
        data = urllib.parse.unquote_to_bytes(content)
        return _base64(data) if re.search(r"(?i);\s*base64\s*$", kind) else data
    except ValueError as e:
        raise ImageError(name, f"does not hold valid base64 ({one_line(e)})") from None


def _base64(data: bytes) -> bytes:
    """Decodes base64, also without padding, in lines, or in the alphabet for URLs."""
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def shortened(text: str) -> str:
    """A text as one printable line, long ones by their beginning and end."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN * 2 // 3]}...{text[-_SHOWN // 4 :]}"
    return text if text.isprintable() else repr(text)[1:-1]


def one_line(error: BaseException) -> str:
    """The reason that an exception gives, as one short line."""
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
    if isinstance(reason, BaseException) and reason is not error:
        return one_line(reason)
    return shortened(" ".join(str(reason).split())) or type(error).__name__


def without_credentials(text: str) -> str:
    """The same text with the user and password of every URL left out."""
    return re.sub(r"(?i)\b(https?:/*)[^\s/?#]*@", r"\1", text)


def _presentable(text: str) -> str:
    """A URL without credentials, query and fragment, whether or not it is a valid one."""
    try:
        urllib.parse.urlsplit(text).port  # noqa: B018
        text = re.sub(r"^(\w+:/*)[^/?#]*@", r"\1", text)
    except ValueError:
        # A / or # in a password ends the host too early: what comes before the last @ is secret.
        text = re.sub(r"(?s)^(\w+:/*).*@", r"\1", text)
    address, sign, _ = text.partition("#")[0].partition("?")
    return shortened(f"{address}?..." if sign else address)


def _encoded(text: str, safe: str) -> str:
    text = _STRAY_PERCENT.sub("%25", text)
    return urllib.parse.quote(text, safe=safe, errors="surrogateescape")


def _encoded_host(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _basic(user: str | None, password: str | None) -> str:
    """The header of basic authentication."""
    if not user and not password:
        return ""
    words = (urllib.parse.unquote(word or "") for word in (user, password))
    return "Basic " + base64.b64encode(":".join(words).encode()).decode("ascii")
