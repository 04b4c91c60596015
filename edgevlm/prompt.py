"""Questions and answers -> typed segments of the decoder's input, in order.

The template belongs to the model, the words to the user: they are joined here as data, item by
item, so that no text a user types can become a picture or a control token.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

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
_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


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
class Film:
    """Pictures that are the frames of a video.

    Their times and its duration are in seconds; `fps` is how many a second were asked for, None
    where they come from elsewhere.
    """

    times: tuple[float, ...]
    duration: float
    fps: float | None = None


@dataclass(frozen=True)
class Exchange:
    """A question, how many pictures come with it, and its answer: a reply of the model's, a text,
    or None where it is to be answered. With a `film` the pictures are its frames.
    """

    question: str
    n_pictures: int = 0
    answer: Reply | str | None = None
    film: Film | None = None


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
            template = _with_film(spec, system is not None)
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


def _with_film(spec: PromptSpec, system: bool) -> tuple[str, ...]:
    if spec.video is None:
        raise PromptError(
            "this model was not trained on videos, or its bundle is older than those and has to be "
            "exported again; ask about frames of it as pictures"
        )
    return spec.video.system_template if system else spec.video.template


def with_frames(segments: Sequence[Segment], film: Film, spec: VideoSpec) -> list[Segment]:
    """The texts around the pictures of a video."""
    words = {"{count}": in_words(len(film.times)), "{duration}": clock(film.duration)}
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Image):
            if segment.index == 0:
                out.append(Text(_numbered(spec.opening, words)))
            out.append(Text(_numbered(spec.frame, {"{time}": moment(film.times[segment.index])})))
        out.append(segment)
        if isinstance(segment, Image) and segment.index == len(film.times) - 1:
            out.append(Text(spec.closing))
    return out


def in_words(n: int) -> str:
    """A number from 0 to 99 in English, a larger one in digits."""
    if n < len(_TEENS):
        return _TEENS[n]
    tens, ones = divmod(n, 10)
    if tens > len(_TENS) + 1:
        return str(n)
    return _TENS[tens - 2] + (f"-{_TEENS[ones]}" if ones else "")


def clock(seconds: float) -> str:
    """A duration as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


def moment(seconds: float) -> str:
    """A time as MM:SS."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def laid_out(
    segments: Sequence[Segment], plans: Sequence[Plan], layout: PictureLayout | None
) -> list[Segment]:
    """Writes each picture as the layout says, by its plan; all of it as it is where there is none.

    Neighbouring texts become one.
    """
    if layout is None:
        return list(segments)
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Image):
            if len(plans) > 1:
                number = {"{number}": str(segment.index + 1)}
                out += [_item(_numbered(item, number), layout) for item in layout.several]
            out += _picture(segment.index, plans[segment.index], layout)
        else:
            out.append(segment)
    return _joined(out)


def _picture(index: int, plan: Plan, layout: PictureLayout) -> Iterator[Segment]:
    """One picture's items; its embeddings are those of its tiles in order, of equal number."""

    def written(items: tuple[str, ...], image: Image) -> Iterator[Segment]:
        for item in items:
            yield image if item == "{image}" else _item(item, layout)

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
            items = tuple(_numbered(item, place) for item in layout.tile)
            yield from written(items, tiles[row * columns + column])
        yield from written(layout.line, Image(index))
    if plan.overview == "last":
        yield from overview


def _item(item: str, layout: PictureLayout) -> Segment:
    if item == "{bos}":
        return Begin()
    return Tokens((layout.tokens[item],)) if item in layout.tokens else Text(item)


def _numbered(item: str, place: Mapping[str, str]) -> str:
    for name, number in place.items():
        item = item.replace(name, number)
    return item


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
