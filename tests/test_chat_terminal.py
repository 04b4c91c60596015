"""A chat in a terminal of its own, as narrow and as poor as some are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.chatting import in_terminal

pytest.importorskip("pty", reason="there are no pseudo-terminals on Windows")
MARKDOWN = "A **red** kettle:\n\n* one\n* two"
PROMPT = "\x1b[?2004h"  # prompt_toolkit reads from here on


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 0, 0)).save(tmp_path / "a.png")


def plain(seen: str) -> str:
    """The text of what was sent to a terminal, without its styles and movements."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", seen).replace("\r", "")


def test_pictures_answers_and_blocks_in_a_terminal(tmp_path: Path) -> None:
    seen = in_terminal(
        tmp_path,
        [
            (PROMPT, "/im\t"),
            ("age", " a\t"),  # what was typed may be on the screen before it is completed
            (".png", "\r"),
            ("Looking at a.png (80 x 60).", ""),
            (PROMPT, '"""what\ris it?"""\r'),
            ("two", ""),
            (PROMPT, "one\x1b\rmore\r"),
            ("fin", ""),
            (PROMPT, "\x03"),
            ("Ctrl-D or /exit leaves.", ""),
            (PROMPT, "\x04"),
        ],
        answers=[MARKDOWN, "fin"],
    )
    assert "\x1b[38;5;160;48;5;160m▀▀" in seen
    assert "A \x1b[1mred\x1b[0m kettle:" in seen and " • " in plain(seen)
    history = (tmp_path / "home" / "chat-history").read_text(encoding="utf-8")
    assert '+"""what\n+is it?"""' in history and "+one\n+more" in history


@pytest.mark.parametrize(
    ("argv", "environ", "signs"),
    [
        (["--plain", "--no-preview"], {}, False),
        ([], {"TERM": "dumb"}, False),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False),
        ([], {"NO_COLOR": "1"}, True),
    ],
    ids=["plain", "dumb", "C", "NO_COLOR"],
)
def test_poor_terminals(
    argv: list[str], environ: dict[str, str], signs: bool, tmp_path: Path
) -> None:
    ready = "> " if environ.get("TERM") == "dumb" else PROMPT
    seen = in_terminal(
        tmp_path,
        [(ready, "what?\r"), ("kettle:", ""), ("two", ""), (ready, "/exit\r")],
        answers=[MARKDOWN],
        argv=["chat", "-m", "mine", "-i", "a.png", *argv],
        environ=environ,
    )
    assert "▀" not in seen and "Traceback" not in seen and "Looking at a.png" in seen
    assert ("• one" in plain(seen)) == signs and ("**red**" in seen) != signs
    assert not re.search(r"\x1b\[(?:3[0-7]|9[0-7]|38;[25])[;m]", seen)


def test_forty_columns(tmp_path: Path) -> None:
    seen = in_terminal(
        tmp_path,
        [(PROMPT, "/help\r"), ("leaves.", ""), (PROMPT, "what?\r"), ("fin", ""), (PROMPT, "\x04")],
        answers=["words " * 20 + "fin"],
        columns=40,
    )
    lines = plain(seen).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("/image PATH"))
    end = next(i for i, line in enumerate(lines) if line.endswith("leaves."))
    assert all(len(line) < 40 for line in lines[start:end])
    assert sum(line.startswith("words") for line in lines) >= 3
    assert all(len(line) <= 40 for line in lines if line.startswith("words"))
