"""Tables on stdout."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def out_console() -> Console:
    """Stdout; names and paths are shown as they are, brackets in them are no markup."""
    return Console(markup=False, highlight=False)


def table(*columns: str) -> Table:
    """A table without lines, whose first column, of names, is never broken."""
    made = Table(box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=i == 0)
    return made
