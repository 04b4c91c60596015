"""JSON schemas in a request: each is refused, or the answer so far fits it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import edgevlm
from workshop.fuzz.mutate import changed, dumped

_SEEDS: tuple[Any, ...] = (
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "total": {"type": "number", "minimum": 0, "exclusiveMaximum": 10000},
            "n": {"type": "integer", "minimum": -5, "maximum": 5, "format": "int32"},
            "when": {"type": "string", "format": "date-time"},
            "tags": {"type": "array", "items": {"enum": ["a", "ab", 1, None]}, "maxItems": 3},
        },
        "required": ["name", "total"],
        "additionalProperties": {"type": "boolean"},
    },
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [{"type": "null"}, {
        "type": "array", "items": {"$ref": "#/$defs/tree"}, "prefixItems": [{"const": "x"}]}]}}},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 10**17, "description": "d"},
    {"oneOf": [{"type": "string", "format": "uuid"}, {"allOf": [{"type": "number"}]}, True]},
)  # fmt: skip


class Fuzzed:
    """Answers of pico that are held to a schema."""

    def __init__(self, folder: Path) -> None:
        self._vlm = edgevlm.load(cache=False)

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        return dumped(changed(rng.choice(_SEEDS), rng), rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        try:
            schema = json.loads(data)
        except (ValueError, RecursionError):
            # A text is no schema either.
            schema = data.decode(errors="surrogateescape")
        self._vlm.ask("ocr", schema=schema, max_tokens=4)
