"""JSON schemas -> grammars for llama.cpp.

What a grammar cannot hold an answer to is refused by its keyword: what fits the grammar fits the
schema. llama-cpp-python's own converter passes over what it does not know, loses the backslashes of
names and mixes up definitions that end alike, so it is not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from edgevlm.errors import PromptError
from edgevlm.gbnf import alternatives, literal
from edgevlm.json_keywords import (
    KEYWORDS,
    NOTES,
    bounds,
    dumped,
    is_of,
    only,
    same,
    sizes,
    types_of,
)
from edgevlm.json_numbers import integers, numbers

_DEEPEST, _MOST_RULES, _AT_ONCE = 100, 50_000, 1000
# JSON's own rules and those that each names. Numbers are as long as float64 has digits, blanks are
# bounded and a surrogate cannot be written, so that no answer runs away in them or cannot be read.
_COMMON: dict[str, tuple[str, ...]] = {
    "blank": ('" "?',),
    "plain": (r"[\x20-\x21\x23-\x5B\x5D-\x7E\U000000A0-\U0000D7FF\U0000E000-\U0010FFFF]",),
    "hex": ("[0-9a-fA-F]",),
    "escape": (r'["\\/bfnrt] | "u" ([0-9a-ceA-CEfF] hex hex hex | [dD] [0-7] hex hex)', "hex"),
    "char": (r'plain | "\\" escape', "plain", "escape"),
    "string": (r'"\"" char* "\""', "char"),
    "whole": ('"0" | [1-9] [0-9]{0,15}',),
    "integer": ('"0" | "-"? [1-9] [0-9]{0,15}',),
    "number": ('"-"? whole ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?', "whole"),
    "boolean": ('"true" | "false"',),
    "null": ('"null"',),
    "pair": (r'string ":" blank any', "string", "blank", "any"),
    "object": ('"{" blank (pair ("," blank pair)* blank)? "}"', "pair"),
    "array": ('"[" blank (any ("," blank any)* blank)? "]"', "any"),
    "any": (
        "object | array | string | number | boolean | null",
        *("object", "array", "string", "number", "boolean", "null"),
    ),
    # A day that the month has in every year.
    "day": (
        '[0-9]{3} [1-9] "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
        ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30")'
        ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))',
    ),
    "hours": (
        '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
        ' ("Z" | [-+] ("0" [0-9] | "1" [0-3]) ":" [0-5] [0-9])',
    ),
}
_FORMATS = {
    "date": (r'"\"" day "\""', "day"),
    "time": (r'"\"" hours "\""', "hours"),
    "date-time": (r'"\"" day "T" hours "\""', "day", "hours"),
    "uuid": (
        r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
        "hex",
    ),
}
_PLAIN = r'[^"\\\x00-\x1f\x7f-\x9f\ud800-\udfff]*'
_WIDTHS = {"int32": 31, "int64": 63}


def schema_grammar(schema: object) -> str:
    """The grammar (GBNF) of the JSON values that fit a schema.

    Properties stand in the schema's order; an object has no others but where
    `additionalProperties` says so. `oneOf` is read as `anyOf`. Raises PromptError, which names the
    keyword and where it stands, for what a grammar cannot hold an answer to.
    """
    return _Converter(schema).grammar


class _Converter:
    def __init__(self, schema: object) -> None:
        self._whole = schema
        self._rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._n = self._depth = 0
        self._rules["root"] = self._value(schema, "#")
        self.grammar = "".join(f"{name} ::= {body}\n" for name, body in self._rules.items())

    def _common(self, *names: str) -> str:
        """Adds rules of JSON's own with all that they name; returns the first name."""
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in self._rules:
                self._rules[name], *needed = _COMMON[name]
                waiting += needed
        return names[0]

    def _named(self, hint: str) -> str:
        """A name that no other rule has: those of JSON's own have no number."""
        self._n += 1
        if len(self._rules) > _MOST_RULES:
            raise PromptError("the schema is too large for a grammar; ask for less at once")
        return f"{re.sub('[^A-Za-z]+', '', hint)[:30] or 'value'}-{self._n}"

    def _add(self, hint: str, body: str) -> str:
        name = self._named(hint.rpartition("/")[2])
        self._rules[name] = body
        return name

    def _value(self, schema: object, where: str) -> str:
        """The name of the rule of a schema's values."""
        if self._depth > _DEEPEST:
            raise PromptError(f"the schema is nested deeper than {_DEEPEST} levels at {where}")
        self._depth += 1
        try:
            return self._any(schema, where)
        finally:
            self._depth -= 1

    def _any(self, schema: object, where: str) -> str:
        if schema is True:
            return self._common("any")
        if not isinstance(schema, Mapping):
            raise PromptError(f"the schema at {where} must be an object or true")
        keys = {str(k) for k in schema if not str(k).startswith("x-")} - NOTES
        for key in ("$ref", "anyOf", "oneOf", "allOf"):
            if key in keys:
                only(keys, {key}, where, f"beside {key}")
                return self._joined(key, schema[key], f"{where}/{key}")
        if keys & {"const", "enum"}:
            only(keys, {"const", "enum", "type"}, where, "beside enum and const")
            return self._listed(schema, where)
        types = types_of(schema, keys, where)
        known = {"type", *(keyword for t in types for keyword in KEYWORDS[t])}
        only(keys, known, where, f"of the type {' or '.join(types) or 'any'}")
        if not types:
            return self._common("any")
        rules = [getattr(self, f"_{t}")(schema, where) for t in types]
        return rules[0] if len(rules) == 1 else self._add(where, " | ".join(rules))

    def _joined(self, key: str, given: Any, where: str) -> str:
        if key == "$ref":
            return self._ref(given, where)
        if not isinstance(given, list) or not given:
            raise PromptError(f"the schema at {where} must be a list that is not empty")
        if key == "allOf" and len(given) > 1:
            raise PromptError(f"the schema's {where} has several schemas; write them as one")
        ways = [self._value(each, f"{where}/{i}") for i, each in enumerate(given)]
        return self._add(where, " | ".join(dict.fromkeys(ways)))

    def _ref(self, ref: object, where: str) -> str:
        if not isinstance(ref, str) or not re.match("#(/|$)", ref):
            raise PromptError(f"the schema's {where} is {ref!r}; only #/... within it is followed")
        if ref in self._refs:
            return self._refs[ref]
        target: Any = self._whole
        for key in unquote(ref).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, Mapping) and key in target:
                target = target[key]
            else:
                raise PromptError(f"the schema's {where} is {ref!r}, and there is no {key!r}")
        name = self._refs[ref] = self._named(ref.rpartition("/")[2])
        self._rules[name] = self._value(target, ref)
        return name

    def _listed(self, schema: Mapping[str, Any], where: str) -> str:
        """One of an enum's values, or a const's."""
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise PromptError(f"the schema's {where}/enum must be a list")
        if "const" in schema:
            values = [v for v in values if same(v, schema["const"])]
        if "type" in schema:
            types = types_of(schema, {"type"}, where)
            values = [v for v in values if any(is_of(v, t) for t in types)]
        if not values:
            raise PromptError(f"the schema at {where} allows no value")
        texts = [dumped(value, where) for value in values]
        name = self._named(where.rpartition("/")[2])
        self._rules[name] = alternatives(texts, name, self._rules)
        return name

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        given, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise PromptError(f"the schema's {where}/properties must be an object")
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise PromptError(f"the schema's {where}/required must be a list of names")
        extra = schema.get("additionalProperties", not given)
        unlisted = [name for name in dict.fromkeys(required) if name not in given]
        if unlisted and extra is False and "additionalProperties" in schema:
            raise PromptError(
                f"the schema's {where} requires {unlisted[0]!r}, which it does not allow"
            )
        if extra is True and not given and not unlisted:
            return self._common("object")
        more = extra if isinstance(extra, Mapping) else True
        properties = {**given, **{name: more for name in unlisted}}
        pairs = []
        for name, value in properties.items():
            rule = self._value(value, f"{where}/properties/{name}")
            key = literal(dumped(name, where) + ":")
            pairs.append((self._add(name, f"{key} blank {rule}"), name in required))
        other = ""
        if extra is not False:
            value = self._value(extra, f"{where}/additionalProperties")
            key = self._other_than(list(properties))
            other = self._add("other", rf'"\"" {key} "\":" blank {value}')
        return self._add(where, self._pairs(pairs, other))

    def _pairs(self, pairs: Sequence[tuple[str, bool]], other: str) -> str:
        """An object of these pairs in their order, some of which may be missing, and others."""
        self._common("blank")
        after = self._add("more", f'("," blank {other})*') if other else ""
        first = f"{other} {after}" if other else ""
        for pair, needed in reversed(pairs):
            begun = f"{pair} {after}"
            if not needed and first:
                begun += f" | {self._add('first', first)}"
            following = f'"," blank {pair}'
            after = self._add("more", f"{following if needed else f'({following})?'} {after}")
            first = begun
        inside = f"({first}) blank" if any(needed for _, needed in pairs) else f"(({first}) blank)?"
        return f'"{{" blank {inside if first else ""} "}}"'

    def _other_than(self, names: Sequence[str]) -> str:
        """A rule for the text of a key that is none of these names; it is written without escapes,
        so that none of them can be spelled in another way.
        """
        self._common("plain")
        root = self._named("key")
        waiting = [(root, [n for n in dict.fromkeys(names) if re.fullmatch(_PLAIN, n)])]
        while waiting:
            rule, ends = waiting.pop()
            begins = sorted({end[0] for end in ends if end})
            outside = "".join(f"\\U{ord(c):08X}" for c in begins)
            ways = [
                r"[^\"\\\x01-\x1F\U0000007F-\U0000009F\U0000D800-\U0000DFFF" + outside + "] plain*"
            ]
            for c in begins:
                following = self._named("key")
                waiting.append((following, [end[1:] for end in ends if end[:1] == c]))
                ways.append(f"{literal(c)} {following}")
            self._rules[rule] = " | ".join([*ways, *([] if "" in ends else ['""'])])
        return root

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        first, low, high = schema.get("prefixItems", []), *sizes(schema, "Items", where)
        if not isinstance(first, list):
            raise PromptError(f"the schema's {where}/prefixItems must be a list")
        items = schema.get("items", not first or low > len(first))
        if isinstance(items, list):
            raise PromptError(f"the schema's {where}/items is a list; write it as prefixItems")
        first = first[:high]
        rules = [self._value(s, f"{where}/prefixItems/{i}") for i, s in enumerate(first)]
        self._common("blank")
        head = ' "," blank '.join(rules)
        low, high = max(low - len(first), 0), None if high is None else high - len(first)
        if items is False or high == 0:
            if low:
                raise PromptError(f"the schema's {where} needs more items than it allows")
            return self._add(where, f'"[" blank {head} blank "]"')
        item = self._value(items, f"{where}/items")
        following = self._add("next", f'"," blank {item}')
        if head:
            return self._add(
                where, f'"[" blank {head} {self._times(following, low, high)} blank "]"'
            )
        rest = self._times(following, max(low - 1, 0), None if high is None else high - 1)
        inside = f"{item} {rest} blank" if low else f"({item} {rest} blank)?"
        return self._add(where, f'"[" blank {inside} "]"')

    def _string(self, schema: Mapping[str, Any], where: str) -> str:
        low, high = sizes(schema, "Length", where)
        kind = _format(schema, where)
        if kind is None and low == 0 and high is None:
            return self._common("string")
        if kind is None:
            return self._add(where, rf'"\"" {self._times(self._common("char"), low, high)} "\""')
        if kind not in _FORMATS or "minLength" in schema or "maxLength" in schema:
            raise PromptError(
                f"the schema's {where}/format {kind!r} cannot be held to"
                f"{' beside a length' if kind in _FORMATS else ''}; leave it out"
            )
        body, *needed = _FORMATS[kind]
        self._common(*needed)
        return self._add(where, body)

    def _integer(self, schema: Mapping[str, Any], where: str) -> str:
        low, high, above, below = bounds(schema, where)
        least = None if low is None else math.floor(low) + 1 if above else math.ceil(low)
        most = None if high is None else math.ceil(high) - 1 if below else math.floor(high)
        kind = _format(schema, where)
        if kind in _WIDTHS:
            least = max(-(2 ** _WIDTHS[kind]) if least is None else least, -(2 ** _WIDTHS[kind]))
            most = min(2 ** _WIDTHS[kind] - 1 if most is None else most, 2 ** _WIDTHS[kind] - 1)
        elif kind is not None:
            raise PromptError(f"the schema's {where}/format {kind!r} cannot be held to")
        if least is None and most is None:
            return self._common("integer")
        return self._bounded(integers(least, most), where)

    def _number(self, schema: Mapping[str, Any], where: str) -> str:
        low, high, above, below = bounds(schema, where)
        if _format(schema, where) not in (None, "float", "double"):
            raise PromptError(f"the schema's {where}/format {schema['format']!r} cannot be held to")
        if low is None and high is None:
            return self._common("number")
        for bound in (low, high):
            if bound is not None and bound != int(bound):
                raise PromptError(
                    f"the schema's {where} has the bound {bound}; numbers can be held to whole "
                    "bounds only"
                )
        whole = [None if bound is None else int(bound) for bound in (low, high)]
        return self._bounded(numbers(whole[0], whole[1], above=above, below=below), where)

    def _bounded(self, body: str, where: str) -> str:
        if not body:
            raise PromptError(f"the schema at {where} allows no value")
        return self._add(where, body)

    def _boolean(self, _: Mapping[str, Any], where: str) -> str:
        return self._common("boolean")

    def _null(self, _: Mapping[str, Any], where: str) -> str:
        return self._common("null")

    def _times(self, unit: str, low: int, high: int | None) -> str:
        """A rule so many times, in groups where they are more than llama.cpp repeats."""
        many, rest = divmod(low, _AT_ONCE)
        large = (
            self._add("many", f"{unit}{{{_AT_ONCE}}}") if max(low, high or 0) >= _AT_ONCE else ""
        )
        exact = f"{f'{large}{{{many}}}' if many else ''} {f'{unit}{{{rest}}}' if rest else ''}"
        if high is None:
            return f"{exact} {unit}*"
        most, n = "", high - low
        if n % _AT_ONCE:
            most = f"{unit}{{0,{n % _AT_ONCE}}}"
        for _ in range(n // _AT_ONCE):
            most = self._add("upto", f"{large} {most} | {unit}{{0,{_AT_ONCE - 1}}}")
        return f"{exact} {most}"


def _format(schema: Mapping[str, Any], where: str) -> str | None:
    kind = schema.get("format")
    if kind is not None and not isinstance(kind, str):
        raise PromptError(f"the schema's {where}/format must be a string")
    return kind
