"""A question -> the parts of the decoder's input, in order.

The template belongs to the model, the words to the user: they are joined here as data, part by
part, so that no text a user types can become a picture or a control token.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.errors import PromptError
from edgevlm.specs import PromptSpec


@dataclass(frozen=True)
class Text:
    """Text that is tokenized by itself."""

    text: str


@dataclass(frozen=True)
class Picture:
    """The rows of the picture with this index."""

    index: int


@dataclass(frozen=True)
class Begin:
    """The begin-of-sequence token."""


Segment = Text | Picture | Begin


def segments(spec: PromptSpec, prompt: str, n_pictures: int) -> list[Segment]:
    """Fills the template: `{image}` once for each of `n_pictures` pictures, `{prompt}` once."""
    parts: list[Segment] = []
    for part in spec.template:
        if part == "{image}":
            parts += [Picture(i) for i in range(n_pictures)]
        elif part == "{bos}":
            parts.append(Begin())
        else:
            parts.append(Text(part.replace("{prompt}", prompt, 1)))
    return parts


def task_prompt(spec: PromptSpec, task: str, prompt: str = "", language: str = "en") -> str:
    """The model's own prompt for a task; raises PromptError if it has no such task."""
    if task not in spec.tasks:
        raise PromptError(
            f"this model has no task {task!r}; it has {', '.join(sorted(spec.tasks)) or 'none'}"
        )
    head, *tail = spec.tasks[task].replace("{language}", language).split("{prompt}")
    return prompt.join([head, *tail])


def check_text(prompt: str) -> str:
    """Returns the prompt; raises PromptError for text that no tokenizer takes."""
    if "\0" in prompt:
        raise PromptError("the prompt contains a NUL character; remove it")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:
        raise PromptError(
            f"the prompt contains a lone surrogate at position {e.start}; it is not valid text"
        ) from None
    return prompt
