"""Strict JSON -> frozen dataclasses: a key too many, too few or of the wrong type is an error."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# One of the two codes that write a character beyond the first 65536.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 200  # characters of a wrong value that a message repeats


class SchemaError(ValueError):
    """The data does not have the shape of the dataclass; the message names the key."""


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError, also for one that is nested too deeply or that
    writes half of a character, which no file and no engine takes.
    """
    try:
        value = json.loads(text)
        if _HALF.search(text if isinstance(text, str) else text.decode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read(cls: type[T], data: Any, where: str = "") -> T:
    """Builds a `cls` (a dataclass) from parsed JSON; `where` prefixes the keys in messages.

    Raises SchemaError for an unknown key, a missing one, or a value of another type.
    """
    if not isinstance(data, dict):
        raise SchemaError(f"{where or 'the file'} must be an object")
    fields = {_key(f): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise SchemaError(f"unknown key {_shown(_join(where, unknown[0]))}")
    types_of = hints(cls)
    values = {}
    for name, spec in fields.items():
        if name in data:
            values[spec.name] = typed(types_of[spec.name], data[name], _join(where, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise SchemaError(f"missing key {_join(where, name)!r}")
    return cls(**values)


def hints(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name, evaluated once: that takes longer than reading."""
    return _evaluated(cls)


_evaluated = functools.cache(typing.get_type_hints)


def plain(value: Any) -> Any:
    """A dataclass as the JSON that `read` reads."""
    if dataclasses.is_dataclass(value):
        return {_key(f): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _key(spec: dataclasses.Field[Any]) -> str:
    """The key of a field in JSON: its name, unless its metadata has a "key"."""
    return str(spec.metadata.get("key", spec.name))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def typed(hint: Any, value: Any, where: str) -> Any:
    """A value of parsed JSON as a field of that type has it; raises SchemaError, in which `where`
    is the key's name.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, where)
    if origin is typing.Literal:
        if value in args:
            return value
    elif origin in (typing.Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        return None if value is None and len(rest) < len(args) else typed(rest[0], value, where)
    elif origin is tuple:
        return _tuple(args, value, where)
    elif origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, dict):
            return {k: typed(args[1], v, _join(where, k)) for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if finite(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise SchemaError(f"{_shown(where)} has the wrong value {_shown(value)}")


def finite(value: float) -> bool:
    """True for a number that a float holds: neither infinity nor NaN, which only Python's JSON has,
    nor a whole number beyond, on which math.isfinite fails.
    """
    return abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    """One short line of a value that may be anything."""
    try:
        text = repr(value)
    except RecursionError:
        return "that is nested too deeply"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise SchemaError(f"{where!r} must be a list")
    if args[-1] is Ellipsis:
        hints = [args[0]] * len(value)
    elif len(args) == len(value):
        hints = list(args)
    else:
        raise SchemaError(f"{where!r} must have {len(args)} items")
    return tuple(
        typed(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )
