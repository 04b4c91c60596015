"""Small pictures on a terminal, byte for byte; and the line that says how far an answer is."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from edgevlm.cli import preview
from edgevlm.cli.preview import blocks, fitted, iterm, kitty, sixel, terminal_kind
from edgevlm.cli.waiting import StageLine, stage_text
from edgevlm.types import Progress

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (100, 100, 100)


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolour"),
        ({"WT_SESSION": "x"}, "truecolour"),
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "256"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "COLORTERM": "truecolor"}, "truecolour"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "256"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "none"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "none"),
        ({"TERM": "linux"}, "none"),
        ({}, "none"),
        ({"TERM": "xterm", "EDGEVLM_PREVIEW": "sixel"}, "sixel"),
        ({"TERM": "xterm-kitty", "EDGEVLM_PREVIEW": "none"}, "none"),
        ({"TERM": "xterm-kitty", "EDGEVLM_PREVIEW": "hologram"}, "kitty"),
    ],
)
def test_the_way_to_show_a_picture(environ: dict[str, str], kind: str) -> None:
    assert terminal_kind(environ, "utf-8") == kind


def test_blocks_need_their_sign() -> None:
    assert terminal_kind({"TERM": "xterm-256color"}, "ANSI_X3.4-1968") == "none"
    assert terminal_kind({"TERM": "xterm-kitty"}, "ANSI_X3.4-1968") == "kitty"


@pytest.mark.parametrize(
    ("size", "space", "cells"),
    [
        ((640, 480), (40, 12), (32, 12)),
        ((100, 10), (40, 12), (40, 2)),
        ((10, 1000), (40, 8), (1, 8)),
        ((5000, 1), (39, 8), (39, 1)),
        ((1, 1), (1, 1), (1, 1)),
    ],
)
def test_a_picture_keeps_its_shape(
    size: tuple[int, int], space: tuple[int, int], cells: tuple[int, int]
) -> None:
    assert fitted(*size, *space) == cells


def test_half_blocks() -> None:
    pixels = np.array([[RED, RED, GREY], [BLUE, BLUE, RED]], np.uint8)
    assert blocks(pixels, true_colour=True) == (
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀▀\x1b[38;2;100;100;100;48;2;255;0;0m▀\x1b[0m\n"
    )
    assert blocks(pixels, true_colour=False) == (
        "\x1b[38;5;196;48;5;21m▀▀\x1b[38;5;59;48;5;196m▀\x1b[0m\n"
    )


def test_kittys_protocol_in_pieces() -> None:
    png = bytes(range(256)) * 16
    data = base64.standard_b64encode(png).decode()
    assert len(data) > 4096
    assert kitty(png, 32, 12) == (
        f"\x1b_Ga=T,f=100,q=2,c=32,r=12,m=1;{data[:4096]}\x1b\\\x1b_Gm=0;{data[4096:]}\x1b\\\n"
    )
    assert kitty(b"png", 1, 2) == "\x1b_Ga=T,f=100,q=2,c=1,r=2,m=0;cG5n\x1b\\\n"


def test_iterms_inline_images() -> None:
    assert iterm(b"png", 3, 4) == "\x1b]1337;File=inline=1;size=3;width=3;height=4:cG5n\x07\n"


def test_sixels() -> None:
    pixels = np.zeros((7, 5, 3), np.uint8)
    pixels[:, :] = RED
    pixels[0, 4] = BLUE
    sent = sixel(Image.fromarray(pixels))
    palette = {int(c.split(";")[0]): c.split(";")[2:] for c in sent.split("#")[1:] if ";" in c}
    (red,) = (k for k, v in palette.items() if v == ["100", "0", "0"])
    (blue,) = (k for k, v in palette.items() if v[:2] == ["0", "0"])
    colours = "".join(f"#{k};2;{';'.join(v)}" for k, v in sorted(palette.items()))
    bands = {red: f"#{red}!4~}}", blue: f"#{blue}!4?@"}
    first = "$".join(bands[k] for k in sorted(bands))
    assert sent == f'\x1bPq"1;1;5;7{colours}{first}-#{red}!5@-\x1b\\\n'


def test_a_preview_is_small_and_of_whole_lines() -> None:
    rgb = np.full((300, 4000, 3), 128, np.uint8)
    for columns, lines in ((80, 24), (20, 10), (2, 1)):
        made = preview.preview(rgb, "truecolour", columns, lines)
        assert made.endswith("\x1b[0m\n") and made.count("\n") <= max(lines // 3, 1)
        assert max(line.count("▀") for line in made.splitlines()) < max(columns, 2)
    png = preview.preview(rgb, "iterm", 80, 24).partition(":")[2].rstrip("\x07\n")
    with Image.open(io.BytesIO(base64.b64decode(png))) as sent:
        assert sent.size == (390, 40) or sent.width <= 400
    assert preview.preview(rgb, "none", 80, 24) == ""


# The line while an answer is waited for


@pytest.mark.parametrize(
    ("progress", "seconds", "text"),
    [
        (Progress("vision", 0, 1, "tiles"), 0.0, "encoding the picture"),
        (Progress("vision", 0, 13, "tiles"), 0.0, "encoding 13 tiles"),
        (Progress("vision", 1, 13, "tiles"), 30.0, "encoding: 1 of 13 tiles, 6 min 0 s left"),
        (Progress("prefill", 0, 1205, "tokens"), 9.0, "reading 1,205 tokens"),
        (
            Progress("prefill", 1024, 1205, "tokens"),
            2.0,
            "reading: 1,024 of 1,205 tokens, 0 s left",
        ),
    ],
)
def test_a_stage_and_the_time_left(progress: Progress, seconds: float, text: str) -> None:
    assert stage_text(progress, seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stderr", err := Terminal())
    times = iter([0.0, 6.0, 9.0])
    line = StageLine(lambda: next(times))
    for done in (0, 1, 2):
        line(Progress("vision", done, 2, "tiles"))
    line.erase()
    assert err.getvalue() == "\r\x1b[Kencoding 2 tiles\r\x1b[Kencoding: 1 of 2 ti\r\x1b[K"
    line(Progress("prefill", 0, 5, "tokens"))
    line.erase()
    line.erase()
    assert err.getvalue().endswith("tokens\r\x1b[K")


@pytest.mark.parametrize("term", ["dumb", None])
def test_there_is_no_line_where_none_can_be_erased(
    term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if term:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", err := Terminal() if term else io.StringIO())
    line = StageLine()
    line(Progress("vision", 0, 2, "tiles"))
    line.erase()
    assert err.getvalue() == ""
