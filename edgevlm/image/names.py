"""Names of pictures, as people, terminals, file managers and programs write them.

A file that exists wins over every other reading of its name, so that none is out of reach.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Longer texts are no names that somebody dropped into a terminal.
_LONGEST_NAME = 8192
_URL = re.compile(r"(https?|data):", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(?://([^/\\]*))?(.*)", re.IGNORECASE | re.DOTALL)


def located(name: str) -> Path | str:
    """The file, or the http, https or data URL, that a name stands for.

    Understands what is pasted where a file is dropped (quotes, backslashes before signs, a space
    after it), `~` and file: URLs. A name of no file that exists is read as a path as it is.
    """
    found = _located(name)
    return Path(os.path.expanduser(_unescaped_url(name.strip()))) if found is None else found


def each_located(line: str) -> list[str]:
    """The names in a line: several where every one of them is a file or a URL, else the line."""
    if isinstance(_located(line), Path):
        return [line]
    words = _words(line)
    return words if len(words) > 1 and all(_located(w) is not None for w in words) else [line]


def _located(name: str) -> Path | str | None:
    for text in _readings(name):
        if os.path.exists(text):
            return Path(text)
    return next((text for text in _readings(name) if _URL.match(text)), None)


def _readings(name: str) -> Iterator[str]:
    """Possible meanings of a name, the most literal first."""
    yield name
    text = name.strip()
    yield text
    words = () if _URL.match(text) else _words(text)
    for reading in (text, *words) if len(words) == 1 else (text,):
        yield reading
        yield _unescaped_url(reading)
        yield os.path.expanduser(reading)


def _words(line: str) -> list[str]:
    """A line split as a shell splits it; backslashes are part of names on Windows."""
    if len(line) > _LONGEST_NAME:
        return []
    try:
        if os.name != "nt":
            return shlex.split(line)
        words = shlex.split(line, posix=False)
    except ValueError:  # A quote that nothing closes is part of the name.
        return []
    return [w[1:-1] if len(w) > 1 and w[0] == w[-1] and w[0] in "'\"" else w for w in words]


def _unescaped_url(text: str) -> str:
    """The path of a file: URL of this machine; any other text as it is."""
    found = _FILE_URL.fullmatch(text)
    if not found or (found[1] or "localhost").lower() not in ("localhost", _this_host()):
        return text
    if os.name == "nt":
        return urllib.request.url2pathname(found[2])
    try:
        return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(found[2])))
    except ValueError:  # A lone surrogate is in no file's name.
        return text


def _this_host() -> str:
    return socket.gethostname().lower()
