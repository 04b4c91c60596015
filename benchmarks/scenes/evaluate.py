"""Measures pico on held-out scenes by greedy decoding: what the table in the README says.

Anything that answers prompts about a picture can be measured: an exported bundle through the
public API, or the torch model that was trained.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Protocol

from PIL import Image

from edgevlm.benchmarks.scenes import questions
from edgevlm.benchmarks.scenes.drawing import Box
from edgevlm.benchmarks.scenes.kinds import KINDS, NUMBER_WORDS, OBJECTS, plural
from edgevlm.benchmarks.scenes.simple_scenes import simple_scene
from edgevlm.benchmarks.scenes.textured_scenes import Scene, Thing, make_scene

GENERATORS: dict[str, Callable[[Random], Scene]] = {"training": make_scene, "simple": simple_scene}
TASKS = (
    "colour",
    "shape",
    "count",
    "position",
    "contested position",
    "yes/no",
    "caption",
    "detect",
    "object",
    "detect object",
    "ocr",
)
_LOC = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ?([^;<>]*)")
_SINGULAR = {plural(kind): kind for kind in KINDS}


class Answerer(Protocol):
    """A model that can be measured."""

    def answers(self, picture: Image.Image, prompts: Sequence[str]) -> list[str]:
        """One answer for each prompt about the picture."""


class BundleAnswerer:
    """A bundle, answered through the public API exactly as a user would; ``None`` is the built-in
    model.
    """

    def __init__(self, bundle: str | None) -> None:
        import edgevlm

        self.vlm = edgevlm.load(bundle)

    def answers(self, picture: Image.Image, prompts: Sequence[str]) -> list[str]:
        """One answer for each prompt, one call each."""
        return [self.vlm.ask(prompt, image=picture).text for prompt in prompts]


class Scores:
    """Right and all, for each task."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.wrong: list[tuple[int, str, str, str]] = []  # scene, prompt, wanted, got

    def add(self, task: str, right: int, of: int = 1) -> None:
        """Counts ``right`` of ``of`` answers."""
        self.counts[task][0] += right
        self.counts[task][1] += of

    def share(self, task: str) -> float:
        """Right answers of a task, 0..1; ``nan`` when none was asked."""
        right, of = self.counts[task]
        return right / of if of else float("nan")


def held_out(generator: str, n_scenes: int) -> Iterator[tuple[Scene, Random]]:
    """The same scenes on every machine with the same Pillow, none of them seen in training."""
    for k in range(n_scenes):
        rng = Random(f"evaluate {generator} {k}")
        yield GENERATORS[generator](rng), rng


def evaluate(
    answerer: Answerer,
    generator: str,
    n_scenes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Asks every scene one question of each task that can be asked of it, a caption, and all its
    boxes.
    """
    scores = Scores()
    for index, (scene, rng) in enumerate(held_out(generator, n_scenes)):
        asked = list(questions_of(scene, rng))
        got = answerer.answers(scene.picture, [question.prompt for question in asked])
        for question, answer in zip(asked, got, strict=True):
            _score(scores, index, scene, question, answer)
        progress(index + 1)
    return scores


def table(columns: dict[str, Scores]) -> str:
    """A Markdown table of percentages, one column for each model and set of scenes."""
    lines = ["| task | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for task in TASKS:
        cells = [f"{100 * s.share(task):.1f} ({s.counts[task][1]})" for s in columns.values()]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def questions_of(scene: Scene, rng: Random) -> Iterator[questions.Question]:
    """One question of each task that can be asked of a scene, a caption, and all its boxes."""
    things, word = scene.things, scene.word
    if word is not None:
        yield questions.Question("ocr", word.text, "ocr")
        return
    yield questions.Question("caption en", questions.caption_text(things), "caption")
    for maker in (
        questions.colour,
        questions.shape,
        questions.count,
        partial(questions.position, contested=0.0),
        questions.contested_position,
        questions.exists,
    ):
        for _ in range(8):
            question = maker(things, rng)
            if question is None or (question.task == "count" and question.answer not in "1234"):
                continue
            yield question
            break
    for name in dict.fromkeys(t.name if rng.random() < 0.5 else t.kind for t in things):
        yield questions.Question(
            f"detect {name}", questions.detection_text([name], things), "detect"
        )


def _score(
    scores: Scores, index: int, scene: Scene, question: questions.Question, answer: str
) -> None:
    right: bool
    if question.task == "caption":
        named, wanted = caption_names(answer), Counter(t.name for t in scene.things)
        right = named == wanted
        scores.add("caption", right)
        objects = [name for name in wanted.elements() if name in OBJECTS]
        scores.add("object", sum(((named & wanted)[name]) for name in set(objects)), len(objects))
    elif question.task == "detect":
        label = question.prompt.removeprefix("detect ")
        things = [t for t in scene.things if label in (t.kind, t.name)]
        found = matched(things, answer, label)
        right = found == len(things)
        scores.add("detect object" if label in OBJECTS else "detect", found, len(things))
    else:
        right = answer.strip() == question.answer
        # Naming a lone object counts with the objects named in captions.
        scores.add(question.task, right)
    if not right:
        scores.wrong.append((index, question.prompt, question.answer, answer))


def caption_names(text: str) -> Counter[str]:
    """``"two red circles and a cat"`` -> {"red circle": 2, "cat": 1}."""
    names: Counter[str] = Counter()
    for part in re.split(r", | and ", text.strip()):
        number, _, name = part.partition(" ")
        if number in NUMBER_WORDS:
            head, _, kind = name.rpartition(" ")
            names[f"{head} {_SINGULAR.get(kind, kind)}".strip()] += NUMBER_WORDS.index(number)
        else:
            names[name] += 1
    return names


def matched(things: list[Thing], answer: str, label: str) -> int:
    """Number of objects with a box of their own in the answer, with the right label and IoU above
    one half.
    """
    boxes = []
    for match in _LOC.finditer(answer):
        y0, x0, y1, x1 = (int(v) / 1023 for v in match.groups()[:4])
        if match[5].strip() == label:
            boxes.append((x0, y0, x1, y1))
    found = 0
    for thing in things:
        best = max(boxes, key=lambda box: iou(box, thing.box), default=None)
        if best is not None and iou(best, thing.box) > 0.5:
            boxes.remove(best)
            found += 1
    return found


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return both / (areas - both)
