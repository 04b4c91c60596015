"""Markdown of an answer, laid out on the terminal while it streams.

Whatever cannot change any more is printed once, as any output, and scrolls away; only the last
block is painted again as it grows.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.text import Text
from rich.theme import Theme

# A longer one would be seen; each paints the last block anew.
_PAUSE_S = 0.05
# rich's own lies on black, which a light terminal is not.
_THEME = Theme({"markdown.code": "bold cyan"})
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # one frame, where the terminal knows of them
_STYLE = re.compile(r"\x1b\[[\d;]*m|\x1b\]8;[^\x1b]*\x1b\\")


class StreamedMarkdown:
    """An answer that is laid out as it comes. `write` paints it; the cursor stays at the beginning
    of the line below. `columns` and `lines` are those of the terminal.
    """

    def __init__(
        self,
        write: Callable[[str], object] | None = None,
        *,
        size: tuple[int, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        out = Console(file=sys.stdout)
        self._columns, self._lines = size or (out.size.width, out.size.height)
        self._console = Console(
            file=io.StringIO(),
            force_terminal=True,
            width=self._columns,
            color_system=out.color_system or "standard",  # type: ignore[arg-type]
            no_color=out.no_color,
            legacy_windows=False,
            theme=_THEME,
        )
        self._write = write or _to_stdout
        self._clock, self._painted = clock, -_PAUSE_S
        self._text = ""
        self._live: list[str] = []
        self._begun = False

    def feed(self, text: str) -> None:
        """Takes a further piece of the answer."""
        self._text += text
        now = self._clock()
        if now - self._painted >= _PAUSE_S:
            self._painted = now
            self._paint()

    def close(self) -> None:
        """Paints what is left; the answer is whole."""
        self._paint(last=True)

    def _paint(self, *, last: bool = False) -> None:
        *settled, live = block_texts(self._text)
        self._text = live
        done = [line for block in settled for line in self._block(block)]
        shown = self._block(live, settle=last)
        if last:
            done, shown = done + shown, []
        else:
            shown = shown[-max(self._lines - 2, 1) :]
        lines = [*done, *shown]
        same = 0
        while same < min(len(lines), len(self._live)) and lines[same] == self._live[same]:
            same += 1
        up, self._live = len(self._live) - same, shown
        if up or lines[same:]:
            back = f"\x1b[{up}A" if up else ""
            below = "".join(f"{line}\n" for line in lines[same:])
            self._write(f"{_BEGIN}{back}\r\x1b[J{below}{_END}")

    def _block(self, text: str, *, settle: bool = True) -> list[str]:
        """A block's lines, after a blank one where it is not the first."""
        lines = self._rendered(text)
        if not lines:
            return []
        before, self._begun = self._begun, self._begun or settle
        return ["", *lines] if before else lines

    def _rendered(self, text: str) -> list[str]:
        with self._console.capture() as captured:
            self._console.print(_Answer(text))
        lines = [line.rstrip() for line in captured.get().split("\n")]
        while lines and not _STYLE.sub("", lines[-1]).strip():
            lines.pop()
        while lines and not _STYLE.sub("", lines[0]).strip():
            lines.pop(0)
        return lines


def block_texts(text: str) -> list[str]:
    """A text cut before each of its top-level blocks but the first; at least one text.

    >>> block_texts("# A list\\n\\n* one\\n* two\\n\\nEnd")
    ['# A list\\n\\n', '* one\\n* two\\n\\n', 'End']
    """
    starts = [token.map[0] for token in _parser().parse(text) if token.map and not token.level]
    lines = text.splitlines(keepends=True)
    bounds = [0, *starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _parser() -> MarkdownIt:
    # What looks like HTML is what the model said, such as <loc0123>.
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


class _LeftHeading(Heading):
    """A heading at the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text: Text = self.text
        text.justify = "left"
        text.stylize("bold underline" if self.tag == "h1" else "bold")
        yield text


class _Answer(Markdown):
    """Markdown as chat models write it: a line break is one."""

    elements = {**Markdown.elements, "heading_open": _LeftHeading}

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark")
        self.parsed = _parser().parse(text)
        for token in _inside(self.parsed):
            if token.type == "softbreak":
                token.type = "hardbreak"


def _inside(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inside(token.children or [])


def _to_stdout(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
