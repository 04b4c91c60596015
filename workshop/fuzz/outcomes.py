"""Outcomes of one input: an answer, a refusal, or a finding."""

from __future__ import annotations

import dataclasses
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgevlm.errors import EdgeVLMError

Kind = Literal["answer", "refusal", "exception", "message", "memory", "abort", "hang"]
# A refusal is for people: one line, and no longer than a terminal shows without scrolling.
_LONGEST = 2000
# Words of refusals that an input, and not the machine, has brought about.
_MEMORY = ("not enough memory", "does not fit into memory")
_ROOT = Path(__file__).parent.parent.parent


class Wrong(Exception):
    """An input was accepted and came to the wrong result."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of an input: its kind, one line about it, and where it came from, by which
    findings of one cause are put together.
    """

    kind: Kind
    text: str = ""
    place: str = ""

    @property
    def well(self) -> bool:
        """True for an answer and a refusal."""
        return self.kind in ("answer", "refusal")


def of_error(error: BaseException) -> Outcome:
    """The outcome of an input that raised an error."""
    text = str(error)
    if isinstance(error, MemoryError) or any(word in text for word in _MEMORY):
        return Outcome("memory", _short(text), _place(error))
    if not isinstance(error, EdgeVLMError):
        return Outcome("exception", f"{type(error).__name__}: {_short(text)}", _place(error))
    one_line = text.strip() and len(text.splitlines()) == 1 and len(text) <= _LONGEST
    return Outcome("refusal" if one_line else "message", _short(text), _place(error))


def _short(text: str) -> str:
    return ascii(text[:300])


def _place(error: BaseException) -> str:
    """The innermost line of edgevlm's own that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _ROOT in Path(f.filename).parents and ".venv" not in f.filename]
    last = ours[-1] if ours else frames[-1]
    return f"{Path(last.filename).name}:{last.name} {type(error).__name__}"


@dataclass
class Tally:
    """The outcomes of one target, in numbers, with the first input of every finding."""

    target: str
    seed: int
    minutes: float = 0.0
    inputs: int = 0
    answers: int = 0
    refusals: int = 0
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, outcome: Outcome, data: bytes, folder: Path) -> None:
        """Counts an outcome; the first input of a finding is kept in `folder`."""
        self.inputs += 1
        self.answers += outcome.kind == "answer"
        self.refusals += outcome.kind == "refusal"
        if outcome.well:
            return
        key = f"{outcome.kind} {outcome.place}"
        found = self.findings.setdefault(
            key, {"kind": outcome.kind, "text": outcome.text, "times": 0, "file": ""}
        )
        found["times"] += 1
        if not found["file"]:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self.target}-{len(self.findings)}"
            path.write_bytes(data)
            found["file"] = path.name

    @property
    def line(self) -> str:
        """The tally as a line of JSON."""
        return json.dumps(dataclasses.asdict(self))
