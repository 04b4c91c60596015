"""Training targets of the encoder's patches and of a prompt's nouns.

An answer says little about where it came from: what every patch shows, and what every noun of a
prompt refers to, teaches the way there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np

from edgevlm.benchmarks.scenes.drawing import Box
from edgevlm.benchmarks.scenes.kinds import COLOURS, KINDS, plural
from edgevlm.benchmarks.scenes.phrasings import SIDES
from edgevlm.benchmarks.scenes.questions import Question, reading_order
from edgevlm.benchmarks.scenes.sides import on_side
from edgevlm.benchmarks.scenes.textured_scenes import Thing, Word
from workshop.pico.model import PicoConfig
from workshop.pico.shards import Facts
from workshop.pico.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SLOTS = 2
MASK_CELLS = 7  # along each side of a patch
WORD_KIND = len(KINDS) + 1  # 0 is background
# Of the thing under a patch: its name's place in the caption, its own place among its kind and
# among its name (both in reading order), how many there are of its kind, its name, its colour, and
# in all.
RELATIONS = ("rank", "nth of kind", "nth of name", "of kind", "of name", "of colour", "all")
MOST = 7  # classes of each relation: 0..6


class Named(NamedTuple):
    """The referent of the token at a column of a row; -1 where its things differ or there are none.

    ``left`` counts the things an answer has still to name, -1 in a prompt; ``box`` is that of the
    first thing in reading order. Where a prompt asks about a side, ``thing`` is the index of what
    the noun means, ``beside`` the kinds on its sides, ``asked`` the one on the ``side`` asked about
    and ``side_column`` that of the word for it.
    """

    column: int
    left: int
    number: int
    kind: int
    colour: int
    box: Box
    thing: int = -1
    beside: tuple[int, ...] = (-1,) * len(SIDES)
    asked: int = -1
    side: int = -1
    side_column: int = -1


class Lexicon:
    """Tokens of the kinds and colours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.kinds = {
            tokenizer.word_id(form): kind for kind in KINDS for form in (kind, plural(kind))
        }
        self.colours = {tokenizer.word_id(colour): colour for colour in COLOURS}
        self.sides = {
            tokenizer.word_id(word): k
            for k, forms in enumerate(SIDES.values())
            for form in forms
            for word in form.split()
            if word not in ("to", "the", "on", "of", "side")
        }

    def named(
        self, question: Question, prompt: list[int], things: tuple[Thing, ...], start: int
    ) -> list[Named]:
        """Every noun, with the colour right before it, and every colour without a noun; columns
        count from ``start``.
        """
        found = []
        for column, (before, token, after) in enumerate(
            zip([-1, *prompt[:-1]], prompt, [*prompt[1:], -1], strict=True)
        ):
            kind, colour = self.kinds.get(token), self.colours.get(token)
            if kind is not None:
                colour = self.colours.get(before)
            elif colour is None or after in self.kinds:
                continue
            meant = [t for t in things if kind in (None, t.kind) and colour in (None, t.colour)]
            described = _described(start + column, -1, reading_order(tuple(meant)))
            if question.task == "position" and len(meant) == 1:
                (word,) = (k for k, t in enumerate(prompt) if t in self.sides)
                described = described._replace(
                    thing=things.index(meant[0]),
                    beside=_kinds_beside(meant[0], things),
                    asked=KINDS.index(question.answer),
                    side=self.sides[prompt[word]],
                    side_column=start + word,
                )
            found.append(described)
        return found

    def written(
        self, question: Question, answer: list[int], things: tuple[Thing, ...], start: int
    ) -> list[Named]:
        """For every token of a caption or of boxes, and for the name of what is on a side: what
        the state before it is about to name.
        """
        if question.task == "position":
            meant = [t for t in things if t.kind == question.answer]
            return [_described(start - 1, -1, meant)] if len(meant) == 1 else []
        groups = _groups(question, things)
        if groups is None:
            return []
        found = []
        for column, token in enumerate(answer[:-1]):
            found.append(_described(start + column - 1, len(groups), groups[0]))
            if token in self.kinds:
                groups = groups[1:]
        return [*found, _described(start + len(answer) - 2, 0, [])]


def _groups(question: Question, things: tuple[Thing, ...]) -> list[list[Thing]] | None:
    """The things that an answer names, in its order; a caption puts those of one name together.

    None for answers that name nothing one by one.
    """
    ordered = reading_order(things)
    if question.task == "caption":
        names = dict.fromkeys(t.name for t in ordered)
        return [[t for t in ordered if t.name == name] for name in names]
    if question.task == "detect":
        labels = question.prompt.removeprefix("detect ").split(" ; ")
        return [[t] for label in labels for t in ordered if label in (t.kind, t.name)]
    return None


def _described(column: int, left: int, meant: list[Thing]) -> Named:
    kinds, colours = {t.kind for t in meant}, {t.colour for t in meant}
    colour = colours.pop() if len(colours) == 1 else None
    return Named(
        column,
        min(left, MOST - 1),
        len(meant),
        KINDS.index(kinds.pop()) if len(kinds) == 1 else -1,
        COLOURS.index(colour) if colour else -1,
        meant[0].box if meant else (-1.0, -1.0, -1.0, -1.0),
    )


def _kinds_beside(thing: Thing, things: tuple[Thing, ...]) -> tuple[int, ...]:
    return tuple(KINDS.index(things[k].kind) if k >= 0 else -1 for k in beside(thing, things))


def flipped(pictures: np.ndarray, facts: list[Facts]) -> tuple[np.ndarray, list[Facts]]:
    """The scenes in a mirror; those with letters stay as they are."""
    pictures = pictures.copy()
    turned = list(facts)
    for k, (things, word) in enumerate(facts):
        if word is None:
            pictures[k] = pictures[k, :, ::-1]
            mirrored = (
                replace(t, box=(1 - t.box[2], t.box[1], 1 - t.box[0], t.box[3])) for t in things
            )
            turned[k] = (tuple(mirrored), None)
    return pictures, turned


def patch_targets(facts: list[Facts], grid: int) -> dict[str, np.ndarray]:
    """Targets of each patch; -1 where a head has nothing to learn.

    kind, colour, letter, letter_index: int64 [n, grid * grid(, slots)]; relations: int64 [n, grid *
    grid, len(RELATIONS)]; thing: int64 [n, grid * grid], which of the scene's; beside: int64 [n,
    grid * grid, len(SIDES)], which is on each side of it; centre: float32 [n, grid * grid]; box:
    float32 [n, grid * grid, 4], the object's sides relative to the patch's centre.
    """
    n, g2 = len(facts), grid * grid
    out: dict[str, np.ndarray] = {
        "kind": np.zeros((n, g2), np.int64),
        "colour": np.full((n, g2), -1, np.int64),
        "centre": np.zeros((n, g2), np.float32),
        "box": np.zeros((n, g2, 4), np.float32),
        "relations": np.full((n, g2, len(RELATIONS)), -1, np.int64),
        "thing": np.full((n, g2), -1, np.int64),
        "beside": np.full((n, g2, len(SIDES)), -1, np.int64),
        "letter": np.full((n, g2, LETTER_SLOTS), -1, np.int64),
        "letter_index": np.full((n, g2, LETTER_SLOTS), -1, np.int64),
    }
    for k, (things, word) in enumerate(facts):
        _mark_things({name: value[k] for name, value in out.items()}, things, grid)
        if word is not None:
            _mark_word({name: value[k] for name, value in out.items()}, word, grid)
    return out


def shape_masks(picture: np.ndarray, things: tuple[Thing, ...], config: PicoConfig) -> np.ndarray:
    """Cells of each patch that a shape covers: int8 [patches, cells], -1 where it is not known.

    Read off the picture: inside its box a shape is what is nearer in colour to the box's middle
    than to the ground around its corners.
    """
    side, grid = config.side, config.grid
    mask = np.zeros((side, side), np.int8)
    for thing in things:
        x0, y0, x1, y1 = (round(v * side) for v in thing.box)
        inside = np.s_[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1]
        if thing.colour is None:
            mask[inside] = -1
            continue
        cx, cy = (x0 + x1) // 2, (y0 + y1) // 2
        fill = picture[cy - 1 : cy + 2, cx - 1 : cx + 2].reshape(-1, 3).mean(0, np.float32)
        ys = np.clip([y0 - 2, y0 - 2, y1 + 1, y1 + 1], 0, side - 1)
        xs = np.clip([x0 - 2, x1 + 1, x0 - 2, x1 + 1], 0, side - 1)
        ground = np.sort(picture[ys, xs], 0)[1:3].mean(0, np.float32)
        # |p - fill| < |p - ground|, multiplied out.
        threshold = (fill @ fill - ground @ ground) / 2
        mask[inside] = picture[inside] @ (fill - ground) > threshold
    cell = config.patch // MASK_CELLS
    parts = mask.reshape(grid, MASK_CELLS, cell, grid, MASK_CELLS, cell).transpose(0, 3, 1, 4, 2, 5)
    parts = parts.reshape(grid * grid, MASK_CELLS**2, cell * cell)
    share = parts.mean(-1)
    return np.where((parts < 0).any(-1), -1, share >= 0.5).astype(np.int8)


def relations(things: tuple[Thing, ...]) -> dict[Thing, list[int]]:
    """RELATIONS of every thing."""
    ordered = reading_order(things)
    names = list(dict.fromkeys(t.name for t in ordered))
    kinds = Counter(t.kind for t in things)
    named = Counter(t.name for t in things)
    tones = Counter(t.colour for t in things if t.colour)
    return {
        thing: [
            names.index(thing.name),
            sum(t.kind == thing.kind for t in ordered[:place]),
            sum(t.name == thing.name for t in ordered[:place]),
            kinds[thing.kind],
            named[thing.name],
            tones[thing.colour] if thing.colour else -1,
            len(things),
        ]
        for place, thing in enumerate(ordered)
    }


def beside(thing: Thing, things: tuple[Thing, ...]) -> list[int]:
    """The index of what is on each side of a thing, -1 where nothing is or one might waver."""
    found = [on_side(thing, side, things) for side in SIDES]
    return [-1 if other is None else things.index(other) for other in found]


def _overlap(low: float, high: float, grid: int) -> np.ndarray:
    """The share of each of the cells along a side that the interval covers."""
    edges = np.arange(grid) / grid
    covered = np.minimum(high, edges + 1 / grid) - np.maximum(low, edges)
    return np.asarray(covered.clip(0, None) * grid)


def _mark_things(out: dict[str, np.ndarray], things: tuple[Thing, ...], grid: int) -> None:
    best = np.full(grid * grid, 0.2)
    middles = (np.arange(grid) + 0.5) / grid
    centres = np.stack([np.tile(middles, grid), np.repeat(middles, grid)] * 2, 1)
    related = relations(things)
    for index, thing in enumerate(things):
        x0, y0, x1, y1 = thing.box
        cover = np.outer(_overlap(y0, y1, grid), _overlap(x0, x1, grid)).ravel()
        cx, cy = (min(grid - 1, int(v * grid)) for v in thing.centre)
        cover[cy * grid + cx] += 2
        mine = cover > best
        best[mine] = cover[mine]
        out["kind"][mine] = 1 + KINDS.index(thing.kind)
        out["colour"][mine] = COLOURS.index(thing.colour) if thing.colour else -1
        out["relations"][mine] = related[thing]
        out["thing"][mine] = index
        out["beside"][mine] = beside(thing, things)
        out["box"][mine] = (np.array(thing.box) - centres)[mine]
        out["centre"][cy * grid + cx] = 1


def letter_slots(words: tuple[Word, ...], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters of LETTERS under each part of each patch, and their indices in the word:
    int64 [grid * grid, LETTER_SLOTS], -1 where there is none.
    """
    letter = np.full((grid * grid, LETTER_SLOTS), -1, np.int64)
    index = letter.copy()
    for word in words:
        rows = _overlap(word.box[1], word.box[3], grid)
        inside = np.nonzero(rows > min(0.4, 0.8 * rows.max()))[0]
        for row, column, slot in product(inside, range(grid), range(LETTER_SLOTS)):
            x = (column + (slot + 0.5) / LETTER_SLOTS) / grid
            for place, (left, _, right, _) in enumerate(word.letters):
                if left <= x < right:
                    cell = row * grid + column
                    letter[cell, slot] = LETTERS.index(word.text[place])
                    index[cell, slot] = place
    return letter, index


def _mark_word(out: dict[str, np.ndarray], word: Word, grid: int) -> None:
    out["letter"][:], out["letter_index"][:] = letter_slots((word,), grid)
    mine = (out["letter"] >= 0).any(1)
    middles = (np.arange(grid) + 0.5) / grid
    centres = np.stack([np.tile(middles, grid), np.repeat(middles, grid)] * 2, 1)
    out["kind"][mine] = WORD_KIND
    out["box"][mine] = (np.array(word.box) - centres)[mine]
