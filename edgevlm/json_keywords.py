"""Keywords of JSON schemas: those that a grammar can hold an answer to, and their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgevlm.errors import PromptError
from edgevlm.schema import finite

NOTES = frozenset(
    "title description default examples example deprecated readOnly writeOnly discriminator "
    "$schema $id $comment $defs definitions".split()
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEYWORDS: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "format"),
    "integer": (*_BOUNDS, "format"),
    "number": (*_BOUNDS, "format"),
    "boolean": (),
    "null": (),
}
_OF_PYTHON: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_MOST_TIMES = 50_000


def only(keys: set[str], known: set[str], where: str, context: str) -> None:
    """Raises PromptError for a keyword that is not among the known ones."""
    if unknown := sorted(keys - known):
        raise PromptError(
            f"the schema's {where}/{unknown[0]} cannot be held to, {context}; leave it out, or say "
            "what you need in another way"
        )


def types_of(schema: Mapping[str, Any], keys: set[str], where: str) -> list[str]:
    """The types that a schema allows, none where it allows all."""
    given = schema.get("type")
    if given is None:
        return [t for t in ("object", "array", "string", "number") if keys & {*KEYWORDS[t]}][:1]
    types = given if isinstance(given, list) else [given]
    for t in types:
        if not isinstance(t, str) or t not in KEYWORDS:
            raise PromptError(
                f"the schema's {where}/type {t!r} is unknown; there are {', '.join(KEYWORDS)}"
            )
    if not types:
        raise PromptError(f"the schema's {where}/type allows nothing")
    return [t for t in dict.fromkeys(types) if not (t == "integer" and "number" in types)]


def is_of(value: object, type_: str) -> bool:
    """True for a JSON value of the type; 1.0 is an integer, too, and true no number."""
    whole = isinstance(value, float) and value.is_integer() and type_ == "integer"
    boolean = isinstance(value, bool) and type_ != "boolean"
    return whole or (isinstance(value, _OF_PYTHON[type_]) and not boolean)


def same(a: object, b: object) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def dumped(value: object, where: str) -> str:
    """JSON of a value that the schema holds."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as e:
        raise PromptError(f"the schema at {where} holds a value that is not JSON ({e})") from None
    return text


def sizes(schema: Mapping[str, Any], of: str, where: str) -> tuple[int, int | None]:
    """Least and most characters or items."""
    found: list[int | None] = []
    for key in (f"min{of}", f"max{of}"):
        n = schema.get(key)
        if n is not None and not (is_of(n, "integer") and 0 <= n <= _MOST_TIMES):
            raise PromptError(f"the schema's {where}/{key} must be from 0 to {_MOST_TIMES}")
        found.append(None if n is None else int(n))
    low, high = found[0] or 0, found[1]
    if high is not None and low > high:
        raise PromptError(f"the schema's {where}/min{of} is larger than its max{of}")
    return low, high


def bounds(schema: Mapping[str, Any], where: str) -> tuple[float | None, float | None, bool, bool]:
    """Lower and upper bound of a number, and whether each itself is left out."""
    for key in _BOUNDS:
        bound = schema.get(key)
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if bound is not None and not (number and finite(bound)):
            raise PromptError(f"the schema's {where}/{key} must be a number below 1.8e308")
    low, high = schema.get("minimum"), schema.get("maximum")
    over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    above = over is not None and (low is None or over >= low)
    below = under is not None and (high is None or under <= high)
    return over if above else low, under if below else high, above, below
