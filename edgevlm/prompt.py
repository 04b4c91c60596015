"""Questions and answers -> typed segments of the decoder's input, in order.

The template belongs to the model, the words to the user: they are joined here as data, item by
item, so that no text a user types can become a picture or a control token.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgevlm.errors import PromptError
from edgevlm.image.planned import Plan
from edgevlm.specs import PictureLayout, PromptSpec, VideoSpec
from edgevlm.types import Reply


@dataclass(frozen=True)
class Text:
    """Text that is tokenized by itself."""

    text: str


@dataclass(frozen=True)
class Image:
    """The embeddings of the picture with this index, `begin` to `end` of them where that is not
    None.
    """

    index: int
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Begin:
    """The begin-of-sequence token."""


@dataclass(frozen=True)
class Tokens:
    """Tokens with these ids."""

    ids: tuple[int, ...]


Segment = Text | Image | Begin | Tokens
_ID = re.compile(r"\{id:(\d+)\}")
_WORDS = re.compile(r"\{(prompt|system)\}")


class TaskPrompt(str):
    """A task's prompt in a model that writes its tasks otherwise than questions.

    It reads as a text; `task` is the task, whose template the model is given, and `words` are what
    it is about, each by itself.
    """

    task: str
    words: tuple[str, ...]

    def __new__(cls, text: str, task: str, words: tuple[str, ...]) -> TaskPrompt:
        """The prompt that reads as `text`."""
        prompt = super().__new__(cls, text)
        prompt.task, prompt.words = task, words
        return prompt

    def __getnewargs__(self) -> tuple[str, str, tuple[str, ...]]:  # type: ignore[override]
        return str(self), self.task, self.words


@dataclass(frozen=True)
class Exchange:
    """A question, how many pictures come with it, and its answer: a reply of the model's, a text,
    or None where it is to be answered. A video among the pictures is one of them; with `film` it is
    the first one.
    """

    question: str
    n_pictures: int = 0
    answer: Reply | str | None = None
    film: bool = False


def conversation(
    spec: PromptSpec, exchanges: Sequence[Exchange], system: str | None = None
) -> list[Segment]:
    """Fills the model's templates; pictures are counted through all questions.

    The tokens of a reply are those that the model said. `system` is the system message, None where
    the template's own words stand, if it has any. Raises PromptError for a second question, or for
    a picture that comes with it, where the model's template has none.
    """
    segments: list[Segment] = []
    seen = 0
    words = check_text(system or "")
    if spec.strip:
        words = words.strip()
    for i, exchange in enumerate(exchanges):
        template, text_template = spec.template, spec.text_template
        question: str = exchange.question
        if i:
            template, text_template = spec.turn, spec.text_turn
        elif isinstance(question, TaskPrompt) and question.task in spec.task_templates:
            if not exchange.n_pictures:
                raise PromptError(f"the task {question.task!r} is about a picture; give one")
            template = spec.task_templates[question.task]
            question = " ".join(question.words)
        elif system is not None:
            template, text_template = spec.system_template, spec.system_text_template
        if not exchange.n_pictures and text_template:
            template = text_template
        if exchange.film:
            template = _opened_by_film(spec.video, later=i > 0, system=system is not None)
        if not template:
            raise PromptError(
                "this model answers single questions, it was not trained on conversations; "
                "ask the last question alone"
            )
        if exchange.n_pictures and "{image}" not in template:
            raise PromptError(
                f"question {i + 1} comes with a picture and this model takes pictures with the "
                "first question only; begin a new conversation for another picture"
            )
        if exchange.answer is not None and spec.answered:
            template = (*template[:-1], spec.answered)
        pictures = [Image(seen + j) for j in range(exchange.n_pictures)]
        question = check_text(question)
        if spec.strip:
            question = question.rstrip() if pictures else question.strip()
        elif spec.trim:
            question = question.strip()
        segments += _filled(template, {"prompt": question, "system": words}, pictures)
        seen += exchange.n_pictures
        if isinstance(exchange.answer, Reply) and not spec.joined:
            segments.append(Tokens(exchange.answer.token_ids))
        elif isinstance(exchange.answer, Reply):
            said = exchange.answer.text
            segments.append(Text(said.strip() if spec.trim else said))
        elif exchange.answer is not None:
            answer = check_text(exchange.answer)
            bare = spec.strip or spec.trim
            segments.append(Text(spec.reply + (answer.strip() if bare else answer)))
    return _joined(segments) if spec.joined else segments


def _opened_by_film(video: VideoSpec | None, *, later: bool, system: bool) -> tuple[str, ...]:
    """The template of a question that a video opens."""
    assert video  # whoever is shown one was trained on them
    if later:
        return video.turn
    return video.system_template if system else video.template


def laid_out(
    segments: Sequence[Segment],
    plans: Sequence[Plan],
    layout: PictureLayout | None,
    bare: Collection[int] = (),
) -> list[Segment]:
    """Writes each picture as the layout says, by its plan, but for those that are `bare`; all of it
    as it is where there is no layout.

    Neighbouring texts become one.
    """
    if layout is None:
        return list(segments)
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Image) and segment.index not in bare:
            if len(plans) > 1:
                number = {"{number}": str(segment.index + 1)}
                out += [segment_of(numbered(item, number), layout) for item in layout.several]
            out += _picture(segment.index, plans[segment.index], layout)
        else:
            out.append(segment)
    return _joined(out)


def _picture(index: int, plan: Plan, layout: PictureLayout) -> Iterator[Segment]:
    """One picture's items; its embeddings are those of its tiles in order, of equal number."""

    def written(items: tuple[str, ...], image: Image) -> Iterator[Segment]:
        for item in items:
            yield image if item == "{image}" else segment_of(item, layout)

    rows, columns = plan.grid
    if not rows or not layout.tile:
        yield from written(layout.whole, Image(index))
        return
    each = plan.rows // plan.n_tiles
    tiles = [Image(index, i * each, (i + 1) * each) for i in range(plan.n_tiles)]
    whole = {"none": None, "first": 0, "last": -1}[plan.overview]
    overview = () if whole is None else tuple(written(layout.overview, tiles.pop(whole)))
    if plan.overview == "first":
        yield from overview
    for row in range(rows):
        for column in range(columns):
            place = {"{row}": str(row + 1), "{column}": str(column + 1)}
            items = tuple(numbered(item, place) for item in layout.tile)
            yield from written(items, tiles[row * columns + column])
        yield from written(layout.line, Image(index))
    if plan.overview == "last":
        yield from overview


def segment_of(text: str, layout: PictureLayout) -> Segment:
    """The segment of an item of a layout."""
    if text == "{bos}":
        return Begin()
    return Tokens((layout.tokens[text],)) if text in layout.tokens else Text(text)


def numbered(text: str, words: Mapping[str, str]) -> str:
    """An item of a layout with what stands for numbers and times replaced."""
    for name, word in words.items():
        text = text.replace(name, word)
    return text


def _joined(segments: list[Segment]) -> list[Segment]:
    """The same with neighbouring texts as one."""
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + segment.text)
        else:
            out.append(segment)
    return out


def _filled(
    template: tuple[str, ...], words: Mapping[str, str], pictures: list[Image]
) -> list[Segment]:
    """A template's items with what stands for words replaced at once, so that no text that somebody
    types is looked into.
    """
    segments: list[Segment] = []
    for item in template:
        if item == "{image}":
            segments += pictures
        elif item == "{bos}":
            segments.append(Begin())
        elif token := _ID.fullmatch(item):
            segments.append(Tokens((int(token[1]),)))
        else:
            segments.append(Text(_WORDS.sub(lambda found: words[found[1]], item)))
    return segments


def task_prompt(
    spec: PromptSpec, task: str, about: str | Sequence[str] = "", language: str = "en"
) -> str:
    """The model's own prompt for a task about a question, or about objects by name; raises
    PromptError if it has no such task. A question to a model without a prompt for questions is that
    question.
    """
    words = (about,) if isinstance(about, str) else tuple(about)
    prompt = joined_objects(words)
    if task == "answer" and task not in spec.tasks and language == "en":
        return prompt
    if task not in spec.tasks:
        raise PromptError(
            f"this model has no task {task!r}; it has {', '.join(sorted(spec.tasks)) or 'none'}"
        )
    if language != "en" and "{language}" not in spec.tasks[task]:
        raise PromptError(
            f"this model has no {task} in {language!r}; ask in that language in your own words"
        )
    head, *tail = spec.tasks[task].replace("{language}", language).split("{prompt}")
    text = prompt.join([head, *tail])
    return TaskPrompt(text, task, words) if task in spec.task_templates else text


def caption_task(length: str) -> str:
    """The name of the task of captions of a length, "short", "normal" or "long"."""
    return "caption" if length == "normal" else f"caption_{length}"


def joined_objects(objects: Sequence[str]) -> str:
    """Names of objects as prompts of tasks have them."""
    return " ; ".join(objects)


def normalized(text: str, spec: PromptSpec) -> str:
    """A text as the model's tokenizer is given it."""
    return unicodedata.normalize(spec.normalize, text) if spec.normalize else text


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
