"""Grammars (GBNF) in a request: what passes gbnf.check must be read and followed by llama.cpp."""

from __future__ import annotations

import random
from pathlib import Path

import edgevlm
from workshop.fuzz.mutate import damaged

_ATOMS = (
    *('"a"', "[a-z]", "[^b]", ".", "x", "y", '( "a" | x )', '("b"?)', '"\\n"', "[a\\]b]", "[-a]"),
    *("[\\x41-\\U00000043]", '(\n"a"\n)', '"é"', "[a-]", "[\\uD800-\\uDFFF]", "[^\\U0010FFFF]"),
    *('"' + "a" * 500 + '"', "[" + "ab" * 200 + "]", "[^\\x01-\\U0010FFFE]"),
)
_WRONG = (
    *(
        '""',
        '(x | "")',
        "root",
        "<[3]>",
        "[]",
        "(",
        '")',
        '"\\q"',
        "z",
        "# c\n",
        "((((",
        "!",
        "<x>",
    ),
    '"\\x00"',
)
_REPEATED = ("", "", "", "*", "+", "?", "{2}", "{0}", "{1,3}", "{2,}", "{0,1999}", "{50}", "{0,0}")
_REPEATED_WRONG = ("{2000}", "{", "{ 1 , 2 }", "{,3}", "{99999999999999999999}", "**", "*?")


def _item(rng: random.Random) -> str:
    atoms = _WRONG if rng.random() < 0.03 else _ATOMS
    return rng.choice(atoms) + rng.choice(_REPEATED_WRONG if rng.random() < 0.02 else _REPEATED)


class Fuzzed:
    """Answers of pico that are held to a grammar."""

    def __init__(self, folder: Path) -> None:
        self._vlm = edgevlm.load(cache=False)

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        names = ("root", "x", "y")[: rng.choice((1, 3, 3, 3))]
        lines = []
        for name in names:
            n = rng.randint(name == "root", 3)
            ways = (" ".join(_item(rng) for _ in range(n)) for _ in range(rng.randint(1, 3)))
            lines.append(f"{name} ::= " + rng.choice((" | ", "|", " |\n ")).join(ways))
        text = "\n".join(lines) + rng.choice(("", "\n", "\n\n# end"))
        return damaged(text.encode(), rng) if rng.random() < 0.2 else text.encode()

    def check(self, data: bytes) -> None:
        """See Target."""
        self._vlm.ask("ocr", grammar=data.decode(errors="surrogateescape"), max_tokens=4)
