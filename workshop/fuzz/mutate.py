"""Mutations of bytes and of JSON values."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What stands where a number, a text or a list was expected.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, -(2**31), 2**63, 2**64, 10**30),
    *(10**400, 0.5, -0.5, 1e308, float("inf"), float("nan"), "", " ", "x", "\0", "\ud800", "\n"),
    *("../x", "/etc/passwd", "x" * 300, "é" * 40, "{image}", "<image>", "%s%n", [], [[]], {}),
    *({"": ""}, [0], [None], [1, "a"], {"type": "object"}),
)
_INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(data: bytes, rng: random.Random, window: int | None = None) -> bytes:
    """Bytes with a few of them changed, moved, left out or doubled, the first `window` of them."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        end = max(1, min(len(found), window or len(found)))
        at = rng.randrange(end)
        kind = rng.randrange(7)
        size = rng.choice((1, 2, 4, 8))
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found[at : at + 1] = bytes(
                [(found[at] if at < len(found) else 0) ^ 1 << rng.randrange(8)]
            )
        elif kind == 2:
            value = rng.choice(_INTEGERS) & (1 << 8 * size) - 1
            found[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 3:
            del found[at : at + rng.choice((1, 4, 64, 1024))]
        elif kind == 4:
            found[at:at] = found[at : at + rng.choice((1, 8, 100))]
        elif kind == 5:
            found[at:at] = rng.randbytes(rng.choice((1, 3, 16)))
        else:
            del found[rng.randrange(len(found) + 1) :]
        if not found:
            break
    return bytes(found)


def odd(rng: random.Random) -> Any:
    """A value that nobody expects."""
    if rng.random() < 0.03:
        value: Any = 0
        for _ in range(rng.choice((50, 99, 150))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return copy.deepcopy(rng.choice(ODD))


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with a few changes at any depth."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        try:
            made = _change(made, rng)
        except RecursionError:  # A deep value was put into itself.
            break
    return made


def _change(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return odd(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "type", "\ud800", f"{key} "))] = odd(rng)
    elif kind == 1:
        holder.insert(rng.randrange(len(holder) + 1), odd(rng))
    elif kind == 2:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else other[at])
    elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((-1, 1, 7, 1000, -holder[key], holder[key]))
    elif kind == 4 and isinstance(holder[key], str) and holder[key]:
        holder[key] = damaged(holder[key].encode(errors="replace"), rng).decode(errors="replace")
    else:
        holder[key] = odd(rng)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 20_000:
        each = waiting.pop()
        keys = (
            each.keys()
            if isinstance(each, dict)
            else range(len(each))
            if isinstance(each, list)
            else ()
        )
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


def dumped(value: Any, rng: random.Random) -> bytes:
    """A JSON value as bytes, now and then not quite JSON."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    except RecursionError:
        text = "[" * 2000
    data = text.encode(errors="surrogatepass")
    if rng.random() < 0.03:
        return b"[" * rng.choice((900, 5000, 200_000))
    return damaged(data, rng) if rng.random() < 0.15 else data
