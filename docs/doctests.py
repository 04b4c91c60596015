"""The examples in docstrings as blocks of code: Markdown takes `>>>` for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From the first prompt to the next empty line.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """Fences the examples of everything that pages show."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See griffe.Extension."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring's text with its examples between fences."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
