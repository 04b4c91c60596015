"""Files of a bundle, looked at before an engine opens them; once on a machine, until they change.

A look reads megabytes in Python, a tenth of a second of every start. What a file passed is noted in
the cache folder under all that the system says of it: whoever can write there needs no bundle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from edgevlm.disk_cache import DiskCache
from edgevlm.errors import BundleCorrupt
from edgevlm.gguf_decoder import check_decoder
from edgevlm.models import cache_directory
from edgevlm.onnx_file import check_graph

# Raised whenever a look learns to see more.
_RULES = 2
# Some thousands of notes.
_MOST_BYTES = 1 << 20


def graph(path: Path, beside: Collection[str]) -> None:
    """See check_graph."""
    files = ((name, path.with_name(name)) for name in sorted(beside))
    sizes = [(name, file.stat().st_size) for name, file in files if file.exists()]
    _once(path, repr(sizes), lambda: check_graph(path, beside))


def decoder(path: Path, *, tokenizer: bool = True) -> None:
    """See check_decoder."""
    _once(path, str(tokenizer), lambda: check_decoder(path, tokenizer=tokenizer))


def _once(path: Path, terms: str, look: Callable[[], None]) -> None:
    """Looks at a file unless it passed on these terms before, as it is now."""
    try:
        about = path.stat()
    except OSError as e:
        raise BundleCorrupt(path, f"cannot be read ({e.strerror})") from None
    # Any write moves the last one, also one that sets the time of change back.
    stamp = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    key = repr((_RULES, os.path.realpath(path), stamp, terms))
    notes = DiskCache(cache_directory() / "checked", _MOST_BYTES)
    if notes.get(key) is None:
        look()
        notes.put(key)
