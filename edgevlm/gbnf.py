"""llama.cpp's grammars (GBNF), checked before its own parser sees them.

That parser prints its errors, overlooks left recursion through rules that may be empty, which then
fills the memory, takes the second of two rules of one name, and drops a bound above 2000. Here each
of these is an error that names the line. The reading follows llama.cpp's, so that what passes here
passes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from edgevlm.errors import PromptError

# llama.cpp's own bound of a repetition, times the rules that are repeated.
MOST_REPETITIONS = 1999
_DEEPEST, _LONGEST = 100, 4_000_000
_NAME = re.compile(r"[A-Za-z0-9-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NUMBERS = re.compile(r"(\d+)[ \t]*(?:(,)[ \t]*(\d*)[ \t]*)?\}")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPED = 'trn\\"[]-'


def literal(text: str) -> str:
    """A text as a grammar has it, in quotes.

    >>> print(literal('say "hi"'))
    "say \\"hi\\""
    """
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or _plain(c) for c in text) + '"'


def _plain(c: str) -> str:
    return c if c.isprintable() else f"\\U{ord(c):08X}"


def alternatives(texts: Sequence[str], name: str, rules: dict[str, str]) -> str:
    """An expression for exactly one of the texts; the rules that it needs are added as `name-1` and
    so on.

    Texts that begin alike share that beginning, so that llama.cpp follows one path for all.
    """
    waiting = [("", sorted({*texts}))]
    made: dict[str, str] = {}
    n = 0
    while waiting:
        rule, ends = waiting.pop()
        ways = []
        for first, group in groupby(ends, lambda end: end[:1]):
            alike = list(group)
            shared = _shared(alike)
            if not first or len(alike) == 1:
                ways.append(literal(shared))
                continue
            n += 1
            waiting.append((f"{name}-{n}", [end[len(shared) :] for end in alike]))
            ways.append(f"{literal(shared)} {name}-{n}")
        made[rule] = " | ".join(ways)
    whole = made.pop("")
    rules |= made
    return whole


def _shared(ends: list[str]) -> str:
    """The beginning that sorted texts share."""
    first, last = ends[0], ends[-1]
    n = next((i for i, c in enumerate(first) if i >= len(last) or c != last[i]), len(first))
    return first[:n]


@dataclass
class _Rule:
    """Alternatives, each a list of the rules that it names and whether they may be left out; None
    stands for a character.
    """

    line: int
    ways: list[list[tuple[str | None, bool]]] = field(default_factory=list)


def check(grammar: str) -> None:
    """Raises PromptError, which names the line, for a grammar that llama.cpp cannot use or that no
    finite text fits. Its first rule to be used is `root`.
    """
    if "\0" in grammar:
        raise PromptError("the grammar contains a NUL character; remove it")
    if len(grammar) > _LONGEST:
        raise PromptError(f"the grammar has {len(grammar)} characters, more than {_LONGEST}")
    try:
        grammar.encode("utf-8")
    except UnicodeEncodeError as e:
        raise PromptError(
            f"the grammar contains a lone surrogate at position {e.start}; it is not valid text"
        ) from None
    parser = _Parser(grammar)
    rules = parser.rules
    if "root" not in rules:
        raise PromptError("the grammar has no rule named root; begin with root ::= ...")
    for name, line in parser.named.items():
        if name not in rules:
            raise PromptError(f"the grammar's line {line}: no rule is named {name}")
    _check_recursion(rules)
    ends = _closure(rules, lambda item, known: item[0] is None or item[1] or item[0] in known)
    endless = next((name for name in rules if name not in ends), None)
    if endless is not None:
        raise PromptError(
            f"the grammar's line {rules[endless].line}: {_shown(endless)} never ends, since it "
            "always needs itself again; give it an alternative without itself"
        )


def _shown(name: str) -> str:
    """A rule's name for people; groups have names of their own."""
    return f"rule {name.partition('(')[0]}"


def _closure(
    rules: dict[str, _Rule], fits: Callable[[tuple[str | None, bool], set[str]], bool]
) -> set[str]:
    """The rules that have a way all of whose items fit, given those that do."""
    users: dict[str, list[str]] = {}
    for name, rule in rules.items():
        for item in {item[0] for way in rule.ways for item in way}:
            users.setdefault(item or "", []).append(name)
    known: set[str] = set()
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        if any(all(fits(item, known) for item in way) for way in rules[name].ways):
            known.add(name)
            waiting += users.get(name, ())
    return known


def _check_recursion(rules: dict[str, _Rule]) -> None:
    empty = _closure(rules, lambda item, known: item[1] or item[0] in known)
    begins = {name: {*_begins(rule, empty)} for name, rule in rules.items()}
    done: set[str] = set()
    for start in rules:
        path, waiting = list[str](), [(start, iter(sorted(begins[start])))]
        path.append(start)
        while waiting:
            name, following = waiting[-1]
            child = next(following, None)
            if child is None:
                waiting.pop()
                path.pop()
                done.add(name)
            elif child in path:
                raise PromptError(
                    f"the grammar's line {rules[child].line}: {_shown(child)} begins with itself "
                    "(left recursion), which llama.cpp cannot follow; write it with * or +"
                )
            elif child not in done:
                path.append(child)
                waiting.append((child, iter(sorted(begins[child]))))


def _begins(rule: _Rule, empty: set[str]) -> Iterator[str]:
    """The rules that a text of this one may begin with."""
    for way in rule.ways:
        for name, optional in way:
            if name is not None:
                yield name
            if not optional and name not in empty:
                break


class _Parser:
    """The rules of a grammar, and the lines where they are named in one another; raises PromptError
    where it cannot be read.

    `_symbols` counts names as llama.cpp's parser does, which bounds repetitions by that.
    """

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._symbols: set[str] = set()
        self._n_made = 0
        self.rules: dict[str, _Rule] = {}
        self.named: dict[str, int] = {}
        self._skip(_BLANK_LINES)
        while self._at < len(text):
            self._rule()

    def _fail(self, problem: str, at: int | None = None) -> PromptError:
        line = self._text.count("\n", 0, self._at if at is None else at) + 1
        return PromptError(f"the grammar's line {line}: {problem}")

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        assert match
        self._at = match.end()

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    @property
    def _n_symbols(self) -> int:
        return len(self._symbols) + self._n_made

    def _rule(self) -> None:
        line = self._text.count("\n", 0, self._at) + 1
        match = _NAME.match(self._text, self._at)
        if not match:
            raise self._fail(f"{self._shown()} where a rule's name must stand")
        name, self._at = match[0], match.end()
        self._symbols.add(name)
        self._skip(_BLANK)
        if not self._text.startswith("::=", self._at):
            raise self._fail(f"{self._shown()} where ::= must stand, after the name {name}")
        if name in self.rules:
            raise self._fail(f"rule {name} is there twice; join both with |")
        self._at += 3
        self._skip(_BLANK_LINES)
        self.rules[name] = rule = _Rule(line)
        rule.ways = self._ways(name, 0)
        if self._peek() not in ("", "\r", "\n"):
            raise self._fail(f"{self._shown()} cannot stand here in rule {name}")
        self._skip(_BLANK_LINES)

    def _shown(self) -> str:
        return f"{self._peek()!r}" if self._peek() else "the end"

    def _ways(self, name: str, depth: int) -> list[list[tuple[str | None, bool]]]:
        ways = [self._way(name, depth)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_BLANK_LINES)
            ways.append(self._way(name, depth))
        return ways

    def _way(self, rule: str, depth: int) -> list[tuple[str | None, bool]]:
        blank = _BLANK_LINES if depth else _BLANK
        way: list[tuple[str | None, bool]] = []
        n_rules = 1
        repeatable = False
        while c := self._peek():
            if c in "*+?{":
                low, high = self._bounds(blank)
                if not repeatable:
                    raise self._fail(f"there is nothing before {c} to repeat")
                n_rules = self._repeat(way, low, high, n_rules)
                continue
            begin = self._n_symbols
            if c == '"' or c == "[":
                n = self._literal() if c == '"' else self._class()
                way += [(None, False)] * min(n, 1)
                repeatable = n > 0
            elif c == ".":
                self._at += 1
                way.append((None, False))
                repeatable = True
            elif match := _NAME.match(self._text, self._at):
                self._symbols.add(match[0])
                self.named.setdefault(match[0], self._text.count("\n", 0, self._at) + 1)
                self._at = match.end()
                way.append((match[0], False))
                begin, repeatable = self._n_symbols, True
            elif c == "(":
                way.append((self._group(rule, depth), False))
                repeatable = True
            elif c in "<!":
                raise self._fail("tokens (<...>) are not supported here; write their text")
            else:
                break
            n_rules = max(1, self._n_symbols - begin)
            self._skip(blank)
        return way

    def _group(self, rule: str, depth: int) -> str:
        if depth == _DEEPEST:
            raise self._fail(f"more than {_DEEPEST} groups in one another; name some as rules")
        begin = self._at
        self._at += 1
        self._skip(_BLANK_LINES)
        name = f"{rule.partition('(')[0]}({begin}"
        self._n_made += 1
        line = self._text.count("\n", 0, begin) + 1
        self.rules[name] = _Rule(line, self._ways(rule, depth + 1))
        if self._peek() != ")":
            raise self._fail(f"{self._shown()} where ) must stand, for the ( of line {line}")
        self._at += 1
        return name

    def _bounds(self, blank: re.Pattern[str]) -> tuple[int, int | None]:
        """Least and most repetitions."""
        c = self._peek()
        self._at += 1
        self._skip(blank)
        if c != "{":
            self._skip(blank)
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        match = _NUMBERS.match(self._text, self._at)
        if not match:
            raise self._fail("write repetitions as {2}, {2,} or {2,5}")
        self._at = match.end()
        self._skip(blank)
        low = int(match[1])
        high = (int(match[3]) if match[3] else None) if match[2] else low
        if high is not None and high < low:
            raise self._fail(f"repetitions from {low} to {high}; the second must not be smaller")
        if max(low, high or 0) > MOST_REPETITIONS:
            raise self._fail(f"more than {MOST_REPETITIONS} repetitions; llama.cpp has no more")
        return low, high

    def _repeat(
        self, way: list[tuple[str | None, bool]], low: int, high: int | None, n_rules: int
    ) -> int:
        """Repeats the last item; returns llama.cpp's number of the rules that come of it."""
        total = n_rules * (high or low or 1)
        if total > MOST_REPETITIONS:
            raise self._fail(f"repetitions in repetitions make more than {MOST_REPETITIONS} rules")
        self._n_made += 1 if high is None else high - low
        name, optional = way.pop()
        if high is None and name is not None:
            # As llama.cpp repeats: S* is a rule that is S and itself again.
            again = f"{name}*{self._at}"
            self.rules[again] = _Rule(
                self._text.count("\n", 0, self._at) + 1, [[(name, optional), (again, False)], []]
            )
            way += [(name, optional)] * (low > 0) + [(again, False)]
        elif high != 0:
            way.append((name, optional or low == 0))
        return total

    def _literal(self) -> int:
        begin, n = self._at, 0
        self._at += 1
        while self._peek() != '"':
            if not self._peek():
                raise self._fail('a text without its closing "', begin)
            self._character()
            n += 1
        self._at += 1
        return n

    def _class(self) -> int:
        begin, n = self._at, 0
        self._at += 2 if self._text.startswith("[^", self._at) else 1
        while self._peek() != "]":
            if not self._peek():
                raise self._fail("a class without its closing ]", begin)
            low = self._character()
            n += 1
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                if self._character() < low:
                    raise self._fail("a range of characters that ends before it begins")
        self._at += 1
        if not n:
            raise self._fail("an empty class [] fits no character")
        return n

    def _character(self) -> int:
        c = self._peek()
        self._at += 1
        if c != "\\":
            return ord(c)
        escape = self._peek()
        self._at += 1
        if escape in _HEX:
            digits = self._text[self._at : self._at + _HEX[escape]]
            if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX[escape]}}}", digits):
                raise self._fail(f"\\{escape} takes {_HEX[escape]} hexadecimal digits")
            self._at += len(digits)
            code = int(digits, 16)
            if not 0 < code < 0x110000:
                raise self._fail(f"\\{escape}{digits} is not a character")
            return code
        if not escape or escape not in _ESCAPED:
            raise self._fail(f"unknown escape \\{escape}")
        return ord({"t": "\t", "r": "\r", "n": "\n"}.get(escape, escape))
