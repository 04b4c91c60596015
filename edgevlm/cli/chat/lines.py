"""Lines that are typed into a chat or come from a pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.cli.chat.talk import BLOCK, command_of

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings


class Lines:
    """Input of a chat, a line or a block at a time: with line editing, completion and history
    on a terminal, plain lines from a pipe.
    """

    def __init__(self) -> None:
        self._next = _typed() if sys.stdin.isatty() else _piped()

    def read(self) -> str:
        """Returns the next one; raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""
        return self._next()


def open_block(text: str) -> bool:
    """True for the beginning of a block that has no end yet.

    >>> open_block('\"\"\"one'), open_block('\"\"\"one\"\"\"'), open_block("one")
    (True, False, False)
    """
    text = text.strip()
    return text.startswith(BLOCK) and (len(text) < 2 * len(BLOCK) or not text.endswith(BLOCK))


def _piped() -> Callable[[], str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text may name a file; in a question they are refused by themselves.
        sys.stdin.reconfigure(errors="surrogateescape")

    def read() -> str:
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        while open_block(text) and (line := sys.stdin.readline()):
            text += line
        return text.rstrip("\r\n")

    return read


def _typed() -> Callable[[], str]:
    from prompt_toolkit import PromptSession

    from edgevlm.cli.chat.history import history
    from edgevlm.models import directory

    session: PromptSession[str] = PromptSession(
        "> ",
        history=history(directory().parent / "chat-history"),
        completer=completer(),
        complete_while_typing=False,
        key_bindings=_keys(),
        prompt_continuation=". ",
        enable_open_in_editor=False,
    )
    return session.prompt


def _keys() -> KeyBindings:
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _line_break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter", filter=Condition(lambda: open_block(get_app().current_buffer.text)))
    def _within_a_block(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def completer() -> Completer:
    """Completes commands, their arguments, and paths."""
    from prompt_toolkit.completion import Completer

    class ChatCompleter(Completer):
        def get_completions(self, document: Document, _: object) -> Iterable[Completion]:
            return _completions(document.text_before_cursor)

    return ChatCompleter()


def _completions(text: str) -> Iterator[Completion]:
    from prompt_toolkit.completion import Completion

    from edgevlm.cli.chat.commands import COMMANDS
    from edgevlm.cli.chat.settings import OPTIONS

    word, space, argument = text.partition(" ")
    command = command_of(word)
    if not space and "/" not in text[1:]:
        for one in COMMANDS if text.startswith("/") else ():
            if one.name.startswith(text):
                yield Completion(one.name, -len(text), display_meta=one.help)
        return
    kind = command.completion if command else "pictures"
    if kind == "settings" and " " not in argument.strip():
        names = [name for name in OPTIONS if name.startswith(argument.lstrip())]
        yield from (Completion(name, -len(argument.lstrip())) for name in names)
    elif kind in ("pictures", "videos", "files"):
        typed = argument.lstrip() if command else text
        last = _last_word(typed)
        if command and kind == "pictures" and last == typed:
            for name in ("clipboard", "none"):
                if name.startswith(last):
                    yield Completion(name, -len(last))
        for path in paths(last, kind):
            yield Completion(path, -len(last), display=os.path.basename(path.rstrip("/")))


def _last_word(text: str) -> str:
    """The word at the end of a line, in which a backslash keeps a space.

    >>> _last_word("a.png my\\\\ pho")
    'my\\\\ pho'
    """
    start = 0
    for i, sign in enumerate(text):
        if sign == " " and (i == 0 or text[i - 1] != "\\" or os.name == "nt"):
            start = i + 1
    return text[start:]


def paths(word: str, kind: str) -> list[str]:
    """Paths that begin with a word as it is typed, folders with a slash; of files, those of a kind,
    "pictures" or "videos", or all but hidden ones. Spaces are written as a shell takes them.
    """
    from edgevlm.image.listing import VIDEOS, extensions

    known = {"pictures": extensions(), "videos": VIDEOS}.get(kind)
    typed = word if os.name == "nt" else word.replace("\\ ", " ")
    folder, start = os.path.split(typed)
    found = []
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda e: e.name)
    except OSError:
        return []
    for entry in entries:
        hidden = entry.name.startswith(".") and not start.startswith(".")
        if hidden or not entry.name.startswith(start):
            continue
        is_folder = entry.is_dir()
        if known and not is_folder and Path(entry.name).suffix.lower() not in known:
            continue
        path = os.path.join(folder, entry.name) + ("/" if is_folder else "")
        found.append(path if os.name == "nt" else path.replace(" ", "\\ "))
    return found
