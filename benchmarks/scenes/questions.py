"""Questions that can be asked of a scene, and their answers. Only questions with one right answer
are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from edgevlm.benchmarks.scenes.kinds import (
    ANIMALS,
    COLOURS,
    FRUITS,
    KINDS,
    NUMBER_WORDS,
    OBJECTS,
    SHAPES,
    VEHICLES,
    article,
    plural,
)
from edgevlm.benchmarks.scenes.phrasings import (
    COLOUR_FORMS,
    COUNT_FORMS,
    EXISTS_FORMS,
    EXISTS_MANY_FORMS,
    OCR_FORMS,
    POSITION_FORMS,
    SHAPE_FORMS,
    SIDES,
    WHAT_FORMS,
)
from edgevlm.benchmarks.scenes.sides import Side, unambiguous
from edgevlm.benchmarks.scenes.textured_scenes import Thing, Word

# Where only one object lies on a side it is also the one farthest to that side, so the answer needs
# no look at the place of the object named: most questions must be about the other cases.
CONTESTED_SHARE = 0.6
PLAIN_SHARE = 0.1  # of the questions come without PaliGemma's "answer en "
EASY_SKIPPED = 0.8  # of the colour questions about pictures with only one colour
LOC_STEP = 8  # boxes are taught on every eighth of PaliGemma's 1024 places: 0.8 % of the side


class Question(NamedTuple):
    """A user's question, pico's right answer, and the task it counts for."""

    prompt: str
    answer: str
    task: str


Things = tuple[Thing, ...]
Maker = Callable[[Things, Random], Question | None]


def all_answers(things: Things, word: Word | None, rng: Random) -> Iterator[Question]:
    """An endless stream of questions of mixed tasks about one scene; some repeat."""
    makers = [maker for maker, _ in THING_MAKERS]
    weights = [weight for _, weight in THING_MAKERS]
    one_colour = len({t.colour for t in things if t.colour}) == 1
    while True:
        if word is not None:
            yield (
                read(word, rng)
                if rng.random() < 0.88
                else Question("caption en", caption_text(things, word), "word")
            )
            continue
        maker = rng.choices(makers, weights)[0]
        # Where every shape has one colour, the answer needs no look at the right shape.
        if maker is colour and one_colour and rng.random() < EASY_SKIPPED:
            continue
        question = maker(things, rng)
        if question is not None:
            yield question


def ask(forms: tuple[str, ...], task: str, answer: str, rng: Random, **words: str) -> Question:
    """Fills one of the forms and varies what users vary: spelling, capital, question mark."""
    spelling = rng.choice(("colour", "color"))
    # The first form is the plainest and the one most people type.
    form = forms[0] if rng.random() < 0.35 else rng.choice(forms)
    text = form.format(colour=spelling, **words)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.75:
        text += "?"
    # Some people just ask.
    return Question(text if rng.random() < PLAIN_SHARE else f"answer en {text}", answer, task)


def reading_order(things: Things) -> list[Thing]:
    """Sorts things from the top left to the bottom right; height counts more than width."""
    return sorted(things, key=lambda t: t.centre[1] + 0.35 * t.centre[0])


def caption_text(things: Things, word: Word | None = None) -> str:
    """``"a red circle, two blue stars and a cat"``, in reading order of the first of each."""
    ordered = reading_order(things)
    counts = Counter(thing.name for thing in ordered)
    parts = []
    for name in dict.fromkeys(thing.name for thing in ordered):
        if counts[name] == 1:
            parts.append(f"{article(name)} {name}")
        else:
            head, _, kind = name.rpartition(" ")
            parts.append(f"{NUMBER_WORDS[counts[name]]} {head} {plural(kind)}".replace("  ", " "))
    if word is not None:
        parts.append("a word")
    if not parts:
        return "nothing"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(things: Things, rng: Random) -> Question | None:
    """``caption en``, and the same asked as a question."""
    answer = caption_text(things)
    if rng.random() < 0.75:
        return Question("caption en", answer, "caption")
    forms = (
        "what is in the picture",
        "what do you see",
        "describe the picture",
        "what is in the image",
    )
    if rng.random() < 0.3:
        return Question(rng.choice(("cap en", "describe en")), answer, "caption")
    return ask(forms, "caption", answer, rng)


def colour(things: Things, rng: Random) -> Question | None:
    """Asked of a kind that is there once."""
    shapes = [t for t in things if t.colour and _kinds(things)[t.kind] == 1]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    assert thing.colour is not None
    noun = thing.kind
    if len(things) == 1 and rng.random() < 0.3:
        noun = rng.choice(("shape", "object"))
    return ask(COLOUR_FORMS, "colour", thing.colour, rng, x=noun)


def shape(things: Things, rng: Random) -> Question | None:
    """Asked by a colour that is there once."""
    if len(things) == 1 and rng.random() < 0.5:
        return what(things, rng)
    colours = Counter(t.colour for t in things)
    once = [t for t in things if t.colour and colours[t.colour] == 1]
    if not once:
        return None
    thing = rng.choice(once)
    assert thing.colour is not None
    # An apple is red too: with other objects around, ask for the shape and say so.
    forms = SHAPE_FORMS if all(t.colour for t in things) else SHAPE_FORMS[:3]
    return ask(forms, "shape", thing.kind, rng, x=thing.colour)


def what(things: Things, rng: Random) -> Question | None:
    """Asked of the only object of a scene, or the only animal, fruit, vehicle, or shape."""
    groups = {"animal": ANIMALS, "fruit": FRUITS, "vehicle": VEHICLES, "shape": SHAPES}
    options = []
    for noun, kinds in groups.items():
        inside = [t for t in things if t.kind in kinds]
        if len(inside) == 1:
            options.append((noun, inside[0]))
    if len(things) == 1 and rng.random() < 0.6:
        task = "shape" if things[0].colour else "object"
        return ask(WHAT_FORMS, task, things[0].kind, rng)
    if not options:
        return None
    noun, thing = rng.choice(options)
    forms: tuple[str, ...] = ()
    if len(things) == 1:
        forms = (f"what {noun} is this", f"which {noun} is this")
    forms += (f"what {noun} is there", f"which {noun} is in the picture", f"what {noun} do you see")
    return ask(forms, "shape" if thing.colour else "object", thing.kind, rng)


def count(things: Things, rng: Random) -> Question | None:
    """Counts a kind, a colour, a coloured kind or everything; now and then something absent."""
    draw = rng.random()
    shapes_only = all(t.colour for t in things)
    if draw < 0.25:
        noun = (
            rng.choice(("shapes", "objects", "shapes", "objects", "things"))
            if shapes_only
            else "objects"
        )
        return ask(COUNT_FORMS, "count", str(len(things)), rng, x=noun)
    if draw < 0.35 and shapes_only:
        wanted = rng.choice([t.colour for t in things] + [rng.choice(COLOURS)])
        number = sum(t.colour == wanted for t in things)
        noun = rng.choice(("shapes", "objects"))
        return ask(COUNT_FORMS, "count", str(number), rng, x=f"{wanted} {noun}")
    thing = rng.choice(things)
    if draw < 0.45 and thing.colour:
        number = sum(t.name == thing.name for t in things)
        return ask(COUNT_FORMS, "count", str(number), rng, x=f"{thing.colour} {plural(thing.kind)}")
    kind = rng.choice(_alike_kinds(things, rng)) if draw > 0.9 else _prefer_many(things, rng)
    number = sum(t.kind == kind for t in things)
    return ask(COUNT_FORMS, "count", str(number), rng, x=plural(kind))


def exists(things: Things, rng: Random) -> Question | None:
    """Yes and no equally often; what is absent is usually half right."""
    present = rng.random() < 0.5
    thing = rng.choice(things)
    names, kinds = {t.name for t in things}, _kinds(things)
    if thing.colour and rng.random() < 0.7:
        phrase, many = thing.name, f"{thing.colour} {plural(thing.kind)}"
        if not present:
            kind, tone = rng.choice(
                ((rng.choice(SHAPES), thing.colour), (thing.kind, rng.choice(COLOURS)))
            )
            if f"{tone} {kind}" in names:
                return None
            phrase, many = f"{tone} {kind}", f"{tone} {plural(kind)}"
    else:
        kind = thing.kind if present else rng.choice(_alike_kinds(things, rng))
        if not present and kinds[kind]:
            return None
        phrase, many = kind, plural(kind)
    answer = "yes" if present else "no"
    if rng.random() < 0.2:
        return ask(EXISTS_MANY_FORMS, "yes/no", answer, rng, x=many)
    return ask(EXISTS_FORMS, "yes/no", answer, rng, x=f"{article(phrase)} {phrase}")


def truth(things: Things, rng: Random) -> Question | None:
    """``is the circle red?``, of a kind that is there once."""
    shapes = [t for t in things if t.colour and _kinds(things)[t.kind] == 1]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    tone = thing.colour if rng.random() < 0.5 else rng.choice(COLOURS)
    answer = "yes" if tone == thing.colour else "no"
    return ask((f"is the {thing.kind} {tone}",), "yes/no", answer, rng)


def position(things: Things, rng: Random, contested: float = CONTESTED_SHARE) -> Question | None:
    """Asked when one object is what lies on that side of another that is named without doubt.

    This share of the questions is about a side with several objects, where there is one.
    """
    found = unambiguous(things)
    several = [side for side in found if side.contested]
    return _ask_side(several if several and rng.random() < contested else found, "position", rng)


def contested_position(things: Things, rng: Random) -> Question | None:
    """The same, only about sides with several objects."""
    several = [side for side in unambiguous(things) if side.contested]
    return _ask_side(several, "contested position", rng)


def _ask_side(options: list[Side], task: str, rng: Random) -> Question | None:
    if not options:
        return None
    name, side, found, _ = rng.choice(options)
    noun = "shape" if found.colour and rng.random() < 0.6 else "object"
    words = rng.choice(SIDES[side]) if rng.random() < 0.6 else SIDES[side][0]
    return ask(POSITION_FORMS, task, found.kind, rng, side=words, x=name, thing=noun)


def detect(things: Things, rng: Random) -> Question | None:
    """One to three labels; sometimes one that is not there."""
    labels: list[str] = []
    for _ in range(rng.choices((1, 2, 3), (70, 24, 6))[0]):
        thing = rng.choice(things)
        label = thing.name if rng.random() < 0.5 else thing.kind
        if rng.random() < 0.12:
            label = rng.choice(_alike_kinds(things, rng))
            if rng.random() < 0.5 and label in SHAPES:
                label = f"{rng.choice(COLOURS)} {label}"
        # "circle ; red circle" would find one object twice.
        if not any(
            label.split()[-1] == other.split()[-1]
            for other in labels
            if label in other or other in label
        ):
            labels.append(label)
    return Question("detect " + " ; ".join(labels), detection_text(labels, things), "detect")


def detection_text(labels: list[str], things: Things) -> str:
    """Every box of each label in turn, in PaliGemma's notation; empty when nothing is found."""
    parts = []
    for label in labels:
        for thing in reading_order(things):
            if label in (thing.kind, thing.name):
                parts.append(f"{box_text(thing)} {label}")
    return " ; ".join(parts)


def box_text(thing: Thing) -> str:
    """``<locY0><locX0><locY1><locX1>``."""
    x0, y0, x1, y1 = thing.box
    return "".join(
        f"<loc{min(1016, round(v * 1023 / LOC_STEP) * LOC_STEP):04d}>" for v in (y0, x0, y1, x1)
    )


def read(word: Word, rng: Random) -> Question:
    """``ocr``, and the same asked as a question."""
    if rng.random() < 0.85:
        return Question("ocr", word.text, "ocr")
    return ask(OCR_FORMS, "ocr", word.text, rng)


def _kinds(things: Things) -> Counter[str]:
    return Counter(t.kind for t in things)


def _prefer_many(things: Things, rng: Random) -> str:
    """A kind of the scene; one with several members rather than one alone."""
    kinds = _kinds(things)
    many = [kind for kind, number in kinds.items() if number > 1]
    return rng.choice(many) if many and rng.random() < 0.65 else rng.choice(list(kinds))


def _alike_kinds(things: Things, rng: Random) -> tuple[str, ...]:
    """Kinds to choose something absent from: shapes among shapes, objects among objects, mostly."""
    if rng.random() < 0.2:
        return KINDS
    return SHAPES if rng.choice(things).colour else tuple(OBJECTS)


THING_MAKERS: tuple[tuple[Maker, float], ...] = (
    (caption, 4.5),
    (colour, 1.2),
    (shape, 0.6),
    (what, 0.3),
    (count, 1.8),
    (exists, 0.8),
    (truth, 0.5),
    (position, 5.0),
    (detect, 6.0),
)
