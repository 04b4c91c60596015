"""Makes scenes: a picture, and what is in it. Which questions can be asked of it is in
questions.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

from edgevlm.benchmarks.scenes import drawing
from edgevlm.benchmarks.scenes.assets import WORD_FACES, Face, font, object_bitmaps, random_face
from edgevlm.benchmarks.scenes.drawing import Box, Rgb
from edgevlm.benchmarks.scenes.kinds import COLOURS, OBJECTS, SHAPES, WORDS

MAX_TRIES = 60
# Columns and rows in which the things of an ordered scene stand.
LAYOUTS = ((2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (2, 2), (2, 2), (3, 2), (2, 3), (3, 3))


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene. ``box`` is (x0, y0, x1, y1) as shares of the picture's width and
    height.
    """

    kind: str
    colour: str | None  # only shapes have one
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) as shares of the picture."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        """``"red circle"`` or ``"cat"``."""
        return f"{self.colour} {self.kind}" if self.colour else self.kind


@dataclass(frozen=True, slots=True)
class Word:
    """Printed letters. ``letters`` holds the box of each one, as shares of the picture."""

    text: str
    box: Box
    letters: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn picture (RGB, any size) with everything a question can be about."""

    picture: Image.Image
    things: tuple[Thing, ...]
    word: Word | None = None


def make_scene(
    rng: Random,
    word_share: float = 0.2,
    ordered_share: float = 0.0,
    faces: Sequence[Face] = WORD_FACES,
) -> Scene:
    """Draws one scene; everything about it follows from ``rng`` and the faces for words.

    ``ordered_share`` of the scenes without a word have their things in rows and columns, the
    others anywhere.
    """
    size = picture_size(rng)
    has_word = rng.random() < word_share
    wanted = rng.choices((0, 1, 2), (86, 9, 5))[0] if has_word else _object_count(rng)
    layout = None
    # No draw where the share is nothing: the held-out scenes stay what they were.
    if not has_word and ordered_share and rng.random() < ordered_share:
        layout = rng.choice(LAYOUTS)
        wanted = min(rng.choices((2, 3, 4, 5), (18, 30, 42, 10))[0], layout[0] * layout[1])
    named = _cast(wanted, rng)
    fills = [drawing.named_rgb(colour, rng) if colour else None for _, colour in named]
    tones = two_tones([fill for fill in fills if fill], rng, any_emoji=None in fills)
    canvas = drawing.background(size, tones, rng)
    if layout:
        things = _draw_in_order(canvas, named, fills, layout, rng)
        return Scene(drawing.finish(canvas, rng), tuple(things))
    word = _draw_word(canvas, tones, faces, rng) if has_word else None
    things = _draw_things(canvas, named, fills, [_pixels(word.box, size)] if word else [], rng)
    return Scene(drawing.finish(canvas, rng), tuple(things), word)


def picture_size(rng: Random) -> tuple[int, int]:
    """(width, height) in pixels."""
    side = math.exp(rng.uniform(math.log(72), math.log(420)))
    if rng.random() < 0.1:
        side = rng.uniform(420, 800)
    aspect = 1.0 if rng.random() < 0.35 else math.exp(rng.uniform(-0.75, 0.75))
    if rng.random() < 0.07:
        aspect = math.exp(rng.uniform(-1.1, 1.1))
    return (
        max(64, min(1024, round(side * aspect**0.5))),
        max(64, min(1024, round(side / aspect**0.5))),
    )


def _object_count(rng: Random) -> int:
    return rng.choices((1, 2, 3, 4, 5, 6), (16, 27, 26, 23, 5, 3))[0]


def _cast(count: int, rng: Random) -> list[tuple[str, str | None]]:
    """Draws the things of a scene: shapes only, objects only or both, with repetitions often enough
    to count.
    """
    share = rng.choices((0.0, 1.0, 0.5), (58, 22, 20))[0]
    named = [_one(rng, share) for _ in range(count)]
    if count > 1 and rng.random() < 0.5:
        model_kind, model_colour = named[0]
        for k in range(1, count):
            if rng.random() < 0.6:
                same = rng.random() < 0.5
                colour = model_colour if same or model_colour is None else rng.choice(COLOURS)
                named[k] = (model_kind, colour)
            elif rng.random() < 0.3 and model_colour and named[k][1]:
                named[k] = (named[k][0], model_colour)
    rng.shuffle(named)
    return named


def _one(rng: Random, share: float) -> tuple[str, str | None]:
    if rng.random() < share:
        return rng.choice(tuple(OBJECTS)), None
    return rng.choice(SHAPES), rng.choice(COLOURS)


def two_tones(fills: list[Rgb], rng: Random, *, any_emoji: bool) -> tuple[Rgb, Rgb]:
    """Two background tones that every object stands out from."""
    needed = 75.0 if rng.random() < 0.9 else 45.0
    first = drawing.background_rgb(rng)
    for attempt in range(MAX_TRIES):
        if all(drawing.distance(first, fill) > needed for fill in fills):
            break
        first = drawing.background_rgb(rng)
        needed *= 0.98 if attempt > 20 else 1.0
    if any_emoji and not fills and rng.random() < 0.3:
        first = (255, 255, 255)
    second = first
    for _ in range(MAX_TRIES):
        reach = rng.choice((20, 40, 80))
        second = tuple(max(0, min(255, c + rng.randint(-reach, reach))) for c in first)  # type: ignore[assignment]
        if rng.random() < 0.15:
            second = drawing.background_rgb(rng)
        if all(drawing.distance(second, fill) > needed for fill in fills):
            return first, second
    return first, first


def _draw_things(
    canvas: Image.Image,
    named: list[tuple[str, str | None]],
    fills: list[Rgb | None],
    taken: list[Box],
    rng: Random,
) -> list[Thing]:
    """Places and draws what fits; an object for which no room is found is left out."""
    largest = {1: 0.5, 2: 0.45, 3: 0.42, 4: 0.4}.get(len(named), 0.3)
    alike = rng.uniform(0.16, largest) if rng.random() < 0.3 else None
    things = []
    for (kind, colour), fill in zip(named, fills, strict=True):
        for attempt in range(MAX_TRIES):
            shrink = 1 - 0.6 * attempt / MAX_TRIES
            share = max(0.1, (alike or rng.uniform(0.11, largest)) * shrink)
            box = _draw_one(canvas, kind, fill, share, taken, rng)
            if box is not None:
                taken.append(box)
                things.append(Thing(kind, colour, _shares(box, canvas.size)))
                break
    return things


def _draw_in_order(
    canvas: Image.Image,
    named: list[tuple[str, str | None]],
    fills: list[Rgb | None],
    layout: tuple[int, int],
    rng: Random,
) -> list[Thing]:
    """One thing to a cell of the layout, exactly or nearly in its middle; some cells stay empty."""
    columns, rows = layout
    cells = rng.sample([(x, y) for y in range(rows) for x in range(columns)], len(named))
    width, height = canvas.size
    reference = min(width, height) ** 0.6 * (width * height) ** 0.2
    room = min(width / columns, height / rows) / reference
    alike = rng.uniform(0.5, 0.85) * room if rng.random() < 0.6 else None
    slack = rng.choice((0.0, 0.04, 0.1))
    things: list[Thing] = []
    taken: list[Box] = []
    for (kind, colour), fill, (column, row) in zip(named, fills, cells, strict=True):
        share = alike or rng.uniform(0.4, 0.85) * room
        for shrink in (1.0, 0.85, 0.7, 0.55):
            x = (column + 0.5 + rng.uniform(-slack, slack)) / columns
            y = (row + 0.5 + rng.uniform(-slack, slack)) / rows
            box = _draw_one(canvas, kind, fill, max(0.1, share * shrink), taken, rng, (x, y))
            if box is not None:
                taken.append(box)
                things.append(Thing(kind, colour, _shares(box, canvas.size)))
                break
    return things


def _draw_one(
    canvas: Image.Image,
    kind: str,
    fill: Rgb | None,
    share: float,
    taken: list[Box],
    rng: Random,
    place: tuple[float, float] | None = None,
) -> Box | None:
    """Draws one object, at a place (shares of the picture) or anywhere, where it touches nothing
    else; ``None`` when the place tried is not free.
    """
    width, height = canvas.size
    # Between the shorter side and the geometric mean: visible in a panorama, not larger than it.
    reference = min(width, height) ** 0.6 * (width * height) ** 0.2
    radius = share * reference / 2
    bitmap = None
    points = None
    if fill is None:
        bitmap = _emoji(kind, radius, rng)
        half_w, half_h = bitmap.width / 2, bitmap.height / 2
        offset: Box = (-half_w, -half_h, half_w, half_h)
    else:
        points = drawing.outline_points(kind, rng)
        offset = drawing.extent(points, (0, 0), radius * (1.0 if kind != "square" else 1.15))
        radius *= 1.0 if kind != "square" else 1.15
    margin = 0.01 * reference
    spans = (
        margin - offset[0],
        width - margin - offset[2],
        margin - offset[1],
        height - margin - offset[3],
    )
    if spans[0] > spans[1] or spans[2] > spans[3]:
        return None
    if place is None:
        centre = (rng.uniform(spans[0], spans[1]), rng.uniform(spans[2], spans[3]))
    else:
        x, y = place[0] * width, place[1] * height
        centre = (min(max(x, spans[0]), spans[1]), min(max(y, spans[2]), spans[3]))
    box = (
        offset[0] + centre[0],
        offset[1] + centre[1],
        offset[2] + centre[0],
        offset[3] + centre[1],
    )
    gap = rng.uniform(0.01, 0.05) * reference
    if any(_touch(box, other, gap) for other in taken):
        return None
    if bitmap is not None:
        corner = (round(box[0]), round(box[1]))
        canvas.paste(bitmap, corner, bitmap)
        return (corner[0], corner[1], corner[0] + bitmap.width, corner[1] + bitmap.height)
    assert fill is not None
    drawing.draw_shape(canvas, points, centre, radius, fill, rng)
    return box


def _emoji(kind: str, radius: float, rng: Random) -> Image.Image:
    bitmap = rng.choice(object_bitmaps()[kind])
    if rng.random() < 0.25:
        bitmap = bitmap.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        bitmap = bitmap.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        bitmap = bitmap.crop(bitmap.getchannel("A").getbbox())
    # Objects are richer than shapes: never so small that a person could not name them.
    scale = max(2 * radius * 1.12, 14) / max(bitmap.size)
    shape = (max(1, round(bitmap.width * scale)), max(1, round(bitmap.height * scale)))
    return bitmap.resize(shape, Image.Resampling.BICUBIC)


def _draw_word(
    canvas: Image.Image, tones: tuple[Rgb, Rgb], faces: Sequence[Face], rng: Random
) -> Word:
    text = random_word(rng)
    face = random_face(faces, rng)
    width, height = canvas.size
    ink = ink_rgb(tones, rng)
    pixels = max(9, round(height * rng.uniform(0.16, 0.6)))
    room = width * rng.uniform(0.55, 0.96)
    letters = font(face, pixels)
    if letters.getlength(text) > room:
        pixels = max(9, int(pixels * room / letters.getlength(text)))
        letters = font(face, pixels)
    left, top, right, bottom = letters.getbbox(text)
    x = rng.uniform(0, max(0.0, width - (right - left))) - left
    y = rng.uniform(0, max(0.0, height - (bottom - top))) - top
    ImageDraw.Draw(canvas).text((x, y), text, font=letters, fill=ink)
    return measured(text, letters, x, y, canvas.size)[0]


def ink_rgb(tones: tuple[Rgb, Rgb], rng: Random) -> Rgb:
    """A colour for letters that stands out from the ground."""
    ink = (
        drawing.background_rgb(rng)
        if rng.random() < 0.5
        else rng.choice(((0, 0, 0), (255, 255, 255)))
    )
    for _ in range(MAX_TRIES):
        if min(drawing.distance(ink, tone) for tone in tones) > 110:
            return ink
        ink = drawing.named_rgb(rng.choice(COLOURS), rng)
    return (0, 0, 0) if sum(tones[0]) + sum(tones[1]) > 765 else (255, 255, 255)


def measured(
    text: str, letters: ImageFont.FreeTypeFont, x: float, y: float, size: tuple[int, int]
) -> tuple[Word, Box]:
    """A word drawn at (x, y), and its extent in pixels."""
    left, top, right, bottom = letters.getbbox(text)
    extent = (x + left, y + top, x + right, y + bottom)
    box = _shares(extent, size)
    starts = [(x + letters.getlength(text[:k])) / size[0] for k in range(len(text) + 1)]
    boxes = ((starts[k], box[1], starts[k + 1], box[3]) for k in range(len(text)))
    return Word(text, box, tuple(boxes)), extent


def random_word(rng: Random) -> str:
    """One to five letters: a common word, something pronounceable, or letters at random; in one
    of three cases.
    """
    draw = rng.random()
    if draw < 0.4:
        text = rng.choice(WORDS)
    else:
        length = rng.choices((1, 2, 3, 4, 5), (4, 10, 26, 30, 30))[0]
        if draw < 0.65:
            pools = ("bcdfghjklmnprstvwyz", "aeiou")
            start = rng.randrange(2)
            text = "".join(rng.choice(pools[(start + k) % 2]) for k in range(length))
        else:
            text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
    return rng.choices((text, text.upper(), text.capitalize()), (44, 44, 12))[0]


def _shares(box: Box, size: tuple[int, int]) -> Box:
    clip = [min(1.0, max(0.0, v / size[k % 2])) for k, v in enumerate(box)]
    return clip[0], clip[1], clip[2], clip[3]


def _pixels(box: Box, size: tuple[int, int]) -> Box:
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]


def _touch(one: Box, other: Box, gap: float) -> bool:
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )
