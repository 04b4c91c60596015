"""The lines typed in earlier chats, kept in the home where that is possible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import click
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from edgevlm.image.urls import one_line, without_credentials


def history(path: Path) -> History:
    """The history in a file; this chat's alone, and one line on stderr, where it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b"):
            return _Kept(str(path))
    except OSError as e:
        click.echo(f"{path}: this chat's history is not kept ({one_line(e)})", err=True)
        return InMemoryHistory()


class _Kept(FileHistory):
    """A history file that may become full or go away during a chat, and holds no passwords."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        # UnicodeError: what a terminal pastes that is not text, in older prompt_toolkits.
        with contextlib.suppress(OSError, UnicodeError):
            super().store_string(without_credentials(string))
