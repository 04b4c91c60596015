"""A small picture on the terminal: pure functions from pixels to what a terminal is sent.

docs/decisions/0011-previews.md says why this is our own.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Literal

import click
import numpy as np
from PIL import Image

from edgevlm.image import RGB

Kind = Literal["kitty", "iterm", "sixel", "truecolour", "256", "none"]
KINDS: tuple[Kind, ...] = ("kitty", "iterm", "sixel", "truecolour", "256", "none")
VARIABLE = "EDGEVLM_PREVIEW"

# Cells of a preview at most, and pixels of a cell where they are sent.
_COLUMNS, _ROWS = 40, 12
_CELL = (10, 20)
# kitty's protocol takes a picture in pieces of this size.
_CHUNK = 4096
_SIXEL_COLOURS = 255
# Steps of a channel in the cube of 216 colours.
_CUBE = np.array([0, 95, 135, 175, 215, 255])


def terminal_kind(environ: Mapping[str, str], encoding: str) -> Kind:
    """The way to show a picture on a terminal, by the variables that terminals set; "none" where
    nothing says that it can.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if (chosen := environ.get(VARIABLE, "")) in KINDS:
        return chosen
    if environ.get("NO_COLOR") or term in ("dumb", "unknown", "linux"):
        return "none"
    if not environ.get("TMUX") and not term.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environ or term == "xterm-kitty" or program == "ghostty":
            return "kitty"
        iterm = environ.get("LC_TERMINAL") == "iTerm2"
        if iterm or program in ("iTerm.app", "WezTerm", "mintty"):
            return "iterm"
        if term.startswith(("foot", "mlterm", "contour")):
            return "sixel"
    if not encoding.lower().replace("-", "").startswith("utf"):
        return "none"
    if environ.get("COLORTERM") in ("truecolor", "24bit") or "WT_SESSION" in environ:
        return "truecolour"
    return "256" if term else "none"


def show_preview(rgb: RGB) -> None:
    """Shows a picture on stderr where that is a terminal that can."""
    if not sys.stderr.isatty():
        return
    kind = terminal_kind(os.environ, sys.stderr.encoding or "")
    if kind != "none":
        columns, lines = shutil.get_terminal_size()
        click.echo(preview(rgb, kind, columns, lines), nl=False, err=True, color=True)


def preview(rgb: RGB, kind: Kind, columns: int, lines: int) -> str:
    """A picture uint8 [h, w, 3] for a terminal of that size, as whole lines."""
    if kind == "none":
        return ""
    height, width = rgb.shape[:2]
    wide, high = fitted(width, height, min(columns - 1, _COLUMNS), min(lines // 3, _ROWS))
    cell = (1, 2) if kind in ("truecolour", "256") else _CELL
    small = Image.fromarray(rgb).resize((wide * cell[0], high * cell[1]), reducing_gap=2)
    if kind == "kitty":
        return kitty(_png(small), wide, high)
    if kind == "iterm":
        return iterm(_png(small), wide, high)
    if kind == "sixel":
        return sixel(small)
    return blocks(np.asarray(small), true_colour=kind == "truecolour")


def fitted(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows, of cells twice as high as wide, of a picture in its own shape within a
    space of cells; one at least.

    >>> fitted(640, 480, 40, 12)
    (32, 12)
    """
    scale = min(columns / width, 2 * rows / height)
    return max(round(width * scale), 1), max(round(height * scale / 2), 1)


def blocks(rgb: RGB, *, true_colour: bool) -> str:
    """Pixels uint8 [2 rows, columns, 3] as half blocks, two pixels a cell."""
    code = _true_code if true_colour else _cube_code
    lines = []
    for top, bottom in zip(rgb[::2], rgb[1::2], strict=True):
        cells = [(code(a), code(b)) for a, b in zip(top, bottom, strict=True)]
        line = ""
        for (upper, lower), same in groupby(cells):
            line += f"\x1b[38;{upper};48;{lower}m" + "\u2580" * len(list(same))
        lines.append(f"{line}\x1b[0m\n")
    return "".join(lines)


def _true_code(colour: RGB) -> str:
    return "2;{};{};{}".format(*(int(c) for c in colour))


def _cube_code(colour: RGB) -> str:
    r, g, b = (int(np.abs(_CUBE - int(c)).argmin()) for c in colour)
    return f"5;{16 + 36 * r + 6 * g + b}"


def kitty(png: bytes, columns: int, rows: int) -> str:
    """A PNG by kitty's graphics protocol, on so many cells; no answer is asked for."""
    data = base64.standard_b64encode(png).decode()
    chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    sent = ""
    for i, chunk in enumerate(chunks):
        first = f"a=T,f=100,q=2,c={columns},r={rows}," if i == 0 else ""
        sent += f"\x1b_G{first}m={int(i + 1 < len(chunks))};{chunk}\x1b\\"
    return f"{sent}\n"


def iterm(png: bytes, columns: int, rows: int) -> str:
    """A PNG by iTerm2's inline images, on so many cells."""
    data = base64.standard_b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};height={rows}:{data}\x07\n"


def sixel(picture: Image.Image) -> str:
    """A picture as sixels: its palette, then bands of six lines, a colour at a time."""
    indexed = picture.convert("RGB").quantize(_SIXEL_COLOURS)
    pixels, palette = np.asarray(indexed), indexed.getpalette() or []
    height, width = pixels.shape
    sent = f'\x1bPq"1;1;{width};{height}'
    for colour in np.unique(pixels).tolist():
        r, g, b = (round(c * 100 / 255) for c in palette[3 * colour : 3 * colour + 3])
        sent += f"#{colour};2;{r};{g};{b}"
    for top in range(0, height, 6):
        sent += "$".join(_band(pixels[top : top + 6])) + "-"
    return f"{sent}\x1b\\\n"


def _band(pixels: RGB) -> Iterator[str]:
    """A band of six lines for each of its colours, repeated signs as their number."""
    bits = 1 << np.arange(len(pixels))
    for colour in np.unique(pixels).tolist():
        signs = ((pixels == colour) * bits[:, None]).sum(0) + 63
        line = f"#{colour}"
        for sign, same in groupby(signs.tolist()):
            n = len(list(same))
            line += f"!{n}{chr(sign)}" if n > 3 else chr(sign) * n
        yield line


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
