"""Sizes in bytes as people write them: 500MB, 2 GB, 1GiB."""

from __future__ import annotations

import re

from edgevlm.errors import PromptError

_UNITS = {unit: factor for power, letter in enumerate("kmgt", 1) for unit, factor in (
    (letter, 1000**power), (f"{letter}b", 1000**power), (f"{letter}ib", 1024**power))}  # fmt: skip
_WRITTEN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.ASCII)


def byte_size(size: int | str, name: str) -> int:
    """Bytes of a number, or of a text such as "500MB", "1.5 GiB"; G is GB.

    Raises PromptError, which calls the size by `name`, for anything else and below 0.

    >>> byte_size("2GB", "max_memory"), byte_size("1 MiB", "max_memory")
    (2000000000, 1048576)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _WRITTEN.fullmatch(size.strip().lower()) if isinstance(size, str) else None
    units = {"": 1, "b": 1, **_UNITS}
    if not found or found[2] not in units:
        raise PromptError(f"{name} {size!r} is not a size; write one such as 500MB, 2GB or 1.5GiB")
    return int(float(found[1]) * units[found[2]])


def in_gb(size: int) -> str:
    """A size for people, such as "1.25 GB" or "340 MB"; rounded up, so that it is enough."""
    unit, digits = (1e9, 2) if size >= 1e9 else (1e6, 0)
    rounded = -(-size // int(unit / 10**digits)) / 10**digits
    return f"{rounded:.{digits}f} {'GB' if unit == 1e9 else 'MB'}"
