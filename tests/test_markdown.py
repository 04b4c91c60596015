"""Answers as they are laid out on a terminal while they stream."""

from __future__ import annotations

import re

import pytest

from edgevlm.cli.markdown import StreamedMarkdown, block_texts

TEXT = """\
# Kitchen
A **red** kettle and
a _blue_ pan: <loc0001><seg002>.

* one
* two, which is so long that it goes on in the next line

1. first
2. second

```python
print("*")
```

| a | b |
|---|---|
| 1 | 2 |

End of it.
"""


class Screen:
    """A terminal of 40 columns that knows what is sent here: lines, erasing, going up. `history`
    are the lines that nothing can paint any more; going above them is an error.
    """

    def __init__(self, height: int) -> None:
        self.height = height
        self.lines: list[str] = [""]
        self.row = 0
        self.writes = 0

    def write(self, text: str) -> None:
        self.writes += 1
        for sign in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\|.|\n", text):
            if sign.endswith("A") and sign.startswith("\x1b"):
                self.row -= int(sign[2:-1])
                assert self.row >= max(len(self.lines) - self.height, 0)
            elif sign == "\x1b[J":
                self.lines[self.row :] = [""]
            elif sign == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif not sign.startswith("\x1b") and sign != "\r":
                self.lines[self.row] += sign


def shown(text: str, step: int, height: int = 24) -> Screen:
    """The screen after a text came in pieces of so many characters."""
    screen = Screen(height)
    times = iter(range(10_000))
    answer = StreamedMarkdown(screen.write, size=(40, height), clock=lambda: next(times))
    for i in range(0, len(text), step):
        answer.feed(text[i : i + step])
    answer.close()
    return screen


@pytest.mark.parametrize("height", [5, 24])
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_an_answer_is_laid_out_alike_whatever_pieces_it_came_in(step: int, height: int) -> None:
    lines = shown(TEXT, step, height).lines
    assert lines == shown(TEXT, len(TEXT), 100).lines
    assert lines[:6] == [
        "Kitchen", "", "A red kettle and", "a blue pan: <loc0001><seg002>.", "", " • one"
    ]  # fmt: skip
    assert lines[-3:] == ["", "End of it.", ""] and ' print("*")' in lines
    assert all(len(line) <= 40 for line in lines)


def test_what_is_settled_is_written_once() -> None:
    screen = Screen(24)
    sent: list[str] = []
    answer = StreamedMarkdown(sent.append, size=(40, 24), clock=iter(range(1000)).__next__)
    for word in ("first paragraph\n\n", "second ", "paragraph ", "of ", "words"):
        answer.feed(word)
    answer.close()
    assert sum("first paragraph" in text for text in sent) == 1
    assert all(text.startswith("\x1b[?2026h") and text.endswith("\x1b[?2026l") for text in sent)
    screen.write("".join(sent))
    assert screen.lines == ["first paragraph", "", "second paragraph of words", ""]


def test_a_block_that_is_higher_than_the_screen_is_whole_at_the_end() -> None:
    text = "```\n" + "".join(f"line {i}\n" for i in range(40)) + "```\n\nend\n"
    lines = [line.strip() for line in shown(text, 5, height=10).lines]
    assert lines == [*(f"line {i}" for i in range(40)), "", "end", ""]


def test_little_is_painted_at_a_time() -> None:
    screen, times = Screen(24), iter([0.0, 0.01, 0.02, 0.03, 0.06, 0.07])
    answer = StreamedMarkdown(screen.write, size=(40, 24), clock=lambda: next(times))
    for _ in range(6):
        answer.feed("a ")
    answer.close()
    assert screen.writes == 3 and screen.lines == ["a a a a a a", ""]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        (" red", ["red", ""]),
        ("a\nb", ["a", "b", ""]),
        ("2 * 3 * 4 <b>x</b> [i]", ["2 * 3 * 4 <b>x</b> [i]", ""]),
        ("图" * 21, ["图" * 20, "图", ""]),
    ],
)
def test_texts_that_are_hardly_markdown(text: str, lines: list[str]) -> None:
    assert shown(text, 1).lines == lines


def test_blocks_of_a_text() -> None:
    assert block_texts("") == [""]
    assert block_texts("one\n\n\ntwo") == ["one\n\n\n", "two"]
    assert block_texts("* a\n\n* b\n\n  c\n") == ["* a\n\n* b\n\n  c\n"]
