"""A question -> the parts of the decoder's input, in order.

The template belongs to the model, the words to the user: they are joined here as data, part by
part, so that no text a user types can become a picture or a control token.
"""

from __future__ import annotations

import re
import sys
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


@dataclass(frozen=True)
class Token:
    """The token with this id."""

    id: int


Segment = Text | Picture | Begin | Token
_ID = re.compile(r"\{id:(\d+)\}")


def segments(spec: PromptSpec, prompt: str, n_pictures: int) -> list[Segment]:
    """Fills the template: `{image}` once for each of `n_pictures` pictures, `{prompt}` once."""
    own = spec.text_template if spec.text_template and not n_pictures else spec.template
    return _filled(own, prompt, n_pictures)


def turn(spec: PromptSpec, prompt: str) -> list[Segment]:
    """What comes between an answer and the next one."""
    return _filled(spec.turn, prompt, 0)


def joined(parts: list[Segment]) -> list[Segment]:
    """The same with neighbouring texts as one."""
    out: list[Segment] = []
    for part in parts:
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        else:
            out.append(part)
    return out


def _filled(template: tuple[str, ...], prompt: str, n_pictures: int) -> list[Segment]:
    parts: list[Segment] = []
    for part in template:
        if part == "{image}":
            parts += [Picture(i) for i in range(n_pictures)]
        elif part == "{bos}":
            parts.append(Begin())
        elif token := _ID.fullmatch(part):
            parts.append(Token(int(token[1])))
        else:
            parts.append(Text(part.replace("{prompt}", prompt, 1)))
    return parts


def task_prompt(spec: PromptSpec, task: str, prompt: str = "", language: str = "en") -> str:
    """The model's own prompt for a task; raises PromptError if it has no such task."""
    if task not in spec.tasks:
        raise PromptError(
            f"this model has no task {task!r}; it has {', '.join(sorted(spec.tasks)) or 'none'}"
        )
    if language != "en" and "{language}" not in spec.tasks[task]:
        raise PromptError(
            f"this model has no {task} in {language!r}; ask in that language in your own words"
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
        encoding = sys.getfilesystemencoding()
        if "\udc80" <= prompt[e.start] <= "\udcff" and encoding != "utf-8":
            raise PromptError(
                f"the prompt contains a byte at position {e.start} that is not text in {encoding}, "
                "the encoding of this locale; set PYTHONUTF8=1 where you type UTF-8"
            ) from None
        raise PromptError(
            f"the prompt contains a lone surrogate at position {e.start}; it is not valid text"
        ) from None
    return prompt
