"""Objects that a region model finds: places and sizes out of the decoder's last layer, greedily,
each read as a row of its own (moondream/torch/moondream.py, _generate_points).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from edgevlm.errors import EngineError, PromptError
from edgevlm.prompt import TaskPrompt
from edgevlm.runtimes.engines import Float, RegionModel, TextDecoder
from edgevlm.sampling import Sampling
from edgevlm.specs import Finding, RegionSpec
from edgevlm.types import Box, FinishReason, Point

# Sizes go down to so many powers of two of a side.
_POWERS = 10.0
# Rows that one object is read as, behind the last of which the next begins or all end.
ROWS: Mapping[Finding, int] = {"boxes": 3, "points": 2}
# What a search that takes the likeliest place may be told.
_TAKEN = ("max_tokens", "constraint")


@dataclass(frozen=True)
class Search:
    """A search for objects of one name in a picture of `size` pixels, width and height."""

    label: str
    finding: Finding
    size: tuple[int, int]

    def placed(self, x: float, y: float, width: float, height: float) -> Box | Point:
        """An object in pixels from shares of the sides: its middle, and its size for a box."""
        across, down = self.size
        if self.finding == "points":
            return Point(x * across, y * down, self.label)
        x0, y0, x1, y1 = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        return Box(x0 * across, y0 * down, x1 * across, y1 * down, self.label)


def prompts(spec: RegionSpec | None, question: str, sampling: Sampling) -> list[str]:
    """A question as prompts: one for each object of a task that a region model answers, else itself
    alone. Raises PromptError for options that it cannot follow, and for an object without a name.
    """
    if spec is None or not isinstance(question, TaskPrompt) or question.task not in spec.tasks:
        return [question]
    _check(sampling, question.task)
    if not question.words or not all(word.strip() for word in question.words):
        raise PromptError(f"{question.task} needs names of objects, none of them empty")
    return [TaskPrompt(question, question.task, (word,)) for word in question.words]


def searches(
    spec: RegionSpec | None, asked: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[Search]:
    """The searches of prompts in the one picture of a request, none for those of another kind."""
    return [
        Search(prompt.words[0].strip(), spec.tasks[prompt.task], sizes[0])
        for prompt in asked
        if spec and isinstance(prompt, TaskPrompt) and prompt.task in spec.tasks and sizes
    ]


def longest(spec: RegionSpec | None, found: Sequence[Search], sampling: Sampling) -> int:
    """The most rows that one of the searches reads; 0 without any."""
    if spec is None or not found:
        return 0
    return sampling.max_tokens or ROWS[found[0].finding] * spec.most


def _check(sampling: Sampling, task: str) -> None:
    plain = Sampling()
    for name in (f.name for f in fields(Sampling) if f.name not in _TAKEN):
        if getattr(sampling, name) != getattr(plain, name):
            raise PromptError(
                f"{task} takes the likeliest places and writes no text; leave out {name}"
            )


def found(
    search: Search, spec: RegionSpec, decoder: TextDecoder, model: RegionModel, room: int
) -> Generator[Box | Point, None, FinishReason]:
    """The objects of a search, whose prompt the decoder has read; returns why there are no more,
    which is "length" where `room` has no rows for another, though the model looks for more.
    """

    n = spec.coord_bins

    def bins() -> Float:
        found = model.bins(decoder.hidden())
        if len(found) != n + 2 * spec.size_bins:
            raise EngineError(f"the region model has {len(found)} bins, not the manifest's")
        return found

    fitting = room // ROWS[search.finding]
    for _ in range(min(spec.most, fitting)):
        if int(decoder.logits().argmax()) == spec.end:
            return "stop"
        x = int(bins()[:n].argmax()) / n
        decoder.step_row(model.rows(x, 0.0, 0.0)[0])
        y = int(bins()[:n].argmax()) / n
        decoder.step_row(model.rows(y, 0.0, 0.0)[0])
        width = height = 0.0
        if search.finding == "boxes":
            width, height = (_size(b, spec) for b in bins()[n:].reshape(2, -1).argmax(1))
            decoder.step_row(model.rows(0.0, width, height)[1])
        yield search.placed(x, y, width, height)
    ended = fitting >= spec.most or int(decoder.logits().argmax()) == spec.end
    return "stop" if ended else "length"


def _size(index: int, spec: RegionSpec) -> float:
    """The share of a side that a bin stands for, in float32 as the original has it."""
    step = np.float32(index) / np.float32(spec.size_bins - 1) * np.float32(_POWERS)
    return float(np.power(np.float32(2), step - np.float32(_POWERS), dtype=np.float32))


def rows(thing: Box | Point) -> int:
    """The rows that an object was read as."""
    return ROWS["points" if isinstance(thing, Point) else "boxes"]


def line(thing: Box | Point) -> str:
    """An object as a line of text."""
    if isinstance(thing, Point):
        return f"{thing.label}\t{thing.x:.0f} {thing.y:.0f}"
    return f"{thing.label}\t{thing.x0:.0f} {thing.y0:.0f} {thing.x1:.0f} {thing.y1:.0f}"
