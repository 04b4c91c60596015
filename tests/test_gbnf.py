"""Grammars as users write them, checked before llama.cpp reads them."""

import pytest

from edgevlm import gbnf
from edgevlm.errors import PromptError


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no"',
        '# a comment\n\nroot ::= item ("," item)* # another\nitem ::= [a-z0-9_-]+\n',
        'root ::= (\n  "a" |\n  [^"\\]\\n]\n){2,5} "\\x41\\u00e9\\U0001F600"?',
        'root ::= | "a" root',
        "root ::= .{1999}",
        'root ::= tree\ntree ::= "(" tree* ")"\r\nunused ::= "x"\r\n',
    ],
)
def test_grammars_that_can_be_used(grammar: str) -> None:
    gbnf.check(grammar)


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ("", "no rule named root"),
        ('start ::= "a"', "no rule named root"),
        ("root ::= word", "line 1: no rule is named word"),
        ("root ::= word{0}", "line 1: no rule is named word"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule root is there twice"),
        ('root = "a"', "'=' where ::= must stand"),
        ('root ::= "a', "line 1: a text without its closing"),
        ("root ::= [a-z", "line 1: a class without its closing"),
        ("root ::= []", "an empty class"),
        ("root ::= [z-a]", "a range of characters that ends before it begins"),
        ('root ::= "\\q"', r"unknown escape \\q"),
        ('root ::= "\\x4"', r"\\x takes 2 hexadecimal digits"),
        ('root ::= "\\x00"', "is not a character"),
        ('root ::= ("a"', r"the end where \) must stand"),
        ('root ::= "a")', r"'\)' cannot stand here"),
        ("root ::= *", r"nothing before \* to repeat"),
        ('root ::= "a"{2000}', "more than 1999 repetitions"),
        ('root ::= ("a"{0,100}){100}', "more than 1999 rules"),
        ('root ::= "a"{3,2}', "the second must not be smaller"),
        ('root ::= "a"{,2}', "write repetitions as"),
        ("root ::= <[7]>", "tokens .* are not supported"),
        ('root ::= "a" | root "b"', "rule root begins with itself"),
        ('root ::= x root\nx ::= y\ny ::= "" | "a"', "rule root begins with itself"),
        ("root ::= ([a]*)*", "begins with itself"),
        ('root ::= "a" root', "line 1: rule root never ends"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "more than 100 groups in one another"),
        ('root ::= "\0"', "NUL"),
        ('root ::= "\ud800"', "surrogate"),
    ],
)
def test_grammars_that_cannot_be_used(grammar: str, problem: str) -> None:
    with pytest.raises(PromptError, match=problem) as refused:
        gbnf.check(grammar)
    assert "\n" not in str(refused.value)


def test_alternatives_share_their_beginnings() -> None:
    rules: dict[str, str] = {}
    whole = gbnf.alternatives(["cat", "cattle", "dog", "cat"], "x", rules)
    assert (whole, rules) == ('"cat" x-1 | "dog"', {"x-1": '"" | "tle"'})


def test_many_alternatives_take_little_time() -> None:
    rules: dict[str, str] = {}
    rules["root"] = gbnf.alternatives([f"{i:05}" for i in range(20_000)], "x", rules)
    gbnf.check("".join(f"{name} ::= {body}\n" for name, body in rules.items()))
    assert len(rules["root"]) < 100
