"""Questions and answers as the items of a prompt."""

from __future__ import annotations

import pytest

from edgevlm.prompt import Exchange, Image, Segment, Text, conversation
from edgevlm.specs import PromptSpec

EXCHANGES = [Exchange(" one \n", 1, "\tyes "), Exchange(" two ")]


def spec(*, strip: bool) -> PromptSpec:
    return PromptSpec(
        ("{image}", "{prompt}."), turn=("|{prompt}|{image}",), text_turn=("|{prompt}|",),
        reply="A:", strip=strip,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strip", "expected"),
    [
        (True, [" one.", "A:yes", "|two|"]),
        (False, [" one \n.", "A:\tyes ", "| two |"]),
    ],
)
def test_blanks_around_what_is_said(strip: bool, expected: list[str]) -> None:
    found: list[Segment] = conversation(spec(strip=strip), EXCHANGES)
    assert found == [Image(0), *map(Text, expected)]
