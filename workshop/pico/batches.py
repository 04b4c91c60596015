"""Scenes to training tensors: questions packed behind each picture, and masks.

Two kinds of rows. *Packed*: one row per picture with several questions that cannot see one
another; the image rows see only themselves, so they are computed once for all. *True*: one
question per row, and the image rows see the prompt, as PaliGemma's prefix attention has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from edgevlm.benchmarks.scenes.questions import LOC_STEP, Question, all_answers
from edgevlm.benchmarks.scenes.textured_scenes import Thing, Word
from workshop.pico.model import PicoConfig
from workshop.pico.shards import Facts, read_shard, wait_for_shard
from workshop.pico.targets import (
    Lexicon,
    Named,
    flipped,
    patch_targets,
    shape_masks,
)
from workshop.pico.tokenizer import N_LOC, Tokenizer

# A place one step off is nearly right: the target is spread over its neighbours.
_SPREAD = np.exp(-0.5 * (np.arange(-2, 3) / 0.75) ** 2)
_SPREAD /= _SPREAD.sum()
SCENES_USED = 1408  # of the 2048 of a shard, so that the share of words can vary
SLICE = 8  # pictures of a batch that one thread takes at a time
SHORT = 18  # text tokens of a question with a one-word answer


class Row(NamedTuple):
    """A row of text: ids, the question each belongs to, whether it is prompt, its position."""

    ids: list[int]
    segment: list[int]
    is_prompt: list[bool]
    position: list[int]
    tasks: list[str]
    named: list[Named]
    written: list[Named]


@dataclass
class Meant:
    """Referents of states, see targets.Named: int64 [n, 9] (row * t + column, left, number, kind,
    colour, asked, side, thing, row * t + the side word's column), boxes, float32 [n, 4], and the
    kinds beside, int64 [n, 4].
    """

    facts: Tensor
    boxes: Tensor
    beside: Tensor


@dataclass
class Texts:
    """Rows of similar length. ``picture_of`` maps them to pictures; answer tokens are flat over
    the rows.
    """

    picture_of: Tensor  # int64 [rows]
    ids: Tensor  # int64 [rows, t]
    positions: Tensor
    mask: Tensor  # bool [rows, 1, p + t, p + t]
    where: Tensor  # int64 [answers]: row * t + column of the state that predicts the token
    targets: Tensor  # int64 [answers, 5]
    target_weights: Tensor  # float32 [answers, 5]
    weights: Tensor  # float32 [answers]
    nouns: Meant  # of the prompts
    written: Meant  # of captions and boxes
    tasks: list[str]  # of each question


@dataclass
class Batch:
    """The input of one training step."""

    pictures: Tensor  # uint8 [n, side, side, 3]
    patches: dict[str, Tensor]
    texts: list[Texts]


@dataclass(frozen=True)
class BatchPlan:
    """The make-up of one phase's batches."""

    n_pictures: int
    text_length: int = 160  # packed rows
    true_rows: int = 2  # questions per picture, each in its own row
    mode: str = "packed"  # "vision", "packed" or "true"
    word_share: float = 0.05  # of the scenes used
    object_share: float = 0.4
    true_every: int = 0  # in the packed mode, every so many steps have true rows instead
    ask: Callable[[tuple[Thing, ...], Word | None, Random], Iterator[Question]] = all_answers


def pack(
    questions: Iterator[Question],
    things: tuple[Thing, ...],
    lexicon: Lexicon,
    n_image: int,
    length: int,
    most: int,
) -> Row:
    """Fills a row with different questions about the things until nothing more fits."""
    tokenizer = lexicon.tokenizer
    row = Row([], [], [], [], [], [], [])
    seen: set[str] = set()
    for question in islice(questions, 3 * most):
        if question.prompt.lower().rstrip("?") in seen:
            continue
        prompt = tokenizer.prompt_ids(question.prompt)
        answer = tokenizer.answer_ids(question.answer, question.task)
        n = len(prompt) + len(answer)
        if len(row.ids) + n > length:
            continue
        seen.add(question.prompt.lower().rstrip("?"))
        start = len(row.ids)
        row.named.extend(lexicon.named(question, prompt, things, start))
        row.written.extend(lexicon.written(question, answer, things, start + len(prompt)))
        row.ids.extend(prompt + answer)
        row.segment.extend([len(row.tasks)] * n)
        row.is_prompt.extend([True] * len(prompt) + [False] * len(answer))
        row.position.extend(range(n_image, n_image + n))
        row.tasks.append(question.task)
        if len(row.tasks) == most:
            break
    return row


def build(
    pictures: np.ndarray,
    facts: list[Facts],
    plan: BatchPlan,
    lexicon: Lexicon,
    config: PicoConfig,
    rng: Random,
) -> Batch:
    """Draws questions for each picture and lays them out."""
    p = config.n_image_tokens
    rows: list[Row] = []
    picture_of: list[int] = []
    for index, (things, word) in enumerate(facts if plan.mode != "vision" else []):
        if not things and word is None:
            continue
        stream = plan.ask(things, word, rng)
        if plan.mode == "packed":
            made = [pack(stream, things, lexicon, p, plan.text_length, 20)]
        else:
            n_rows = plan.true_rows if word is None else 1
            made = [pack(stream, things, lexicon, p, plan.text_length, 1) for _ in range(n_rows)]
        rows += made
        picture_of += [index] * len(made)
    order = (
        sorted(range(len(rows)), key=lambda k: len(rows[k].ids))
        if plan.mode == "true"
        else range(len(rows))
    )
    # Short questions must not be padded to the length of a caption.
    short = sum(len(row.ids) <= SHORT for row in rows) if plan.mode == "true" else 0
    texts = []
    for members in (list(order)[:short], list(order)[short:]):
        if members:
            laid_out = _lay_out(
                [rows[k] for k in members],
                p,
                lexicon.tokenizer,
                image_sees_prompt=plan.mode == "true",
            )
            laid_out["picture_of"] = torch.tensor(
                [picture_of[k] for k in members], dtype=torch.int64
            )
            texts.append(Texts(tasks=[task for k in members for task in rows[k].tasks], **laid_out))
    patches = patch_targets(facts, config.grid)
    patches["mask"] = np.stack(
        [shape_masks(p, f[0], config) for p, f in zip(pictures, facts, strict=True)]
    )
    return Batch(
        pictures=torch.from_numpy(np.array(pictures)),
        patches={name: torch.from_numpy(value) for name, value in patches.items()},
        texts=texts,
    )


def _lay_out(
    rows: list[Row], p: int, tokenizer: Tokenizer, *, image_sees_prompt: bool
) -> dict[str, Any]:
    n, t = len(rows), max([len(row.ids) for row in rows], default=1)
    ids, positions = np.zeros((n, t), np.int64), np.full((n, t), p, np.int64)
    segment, is_prompt = np.full((n, t), -1), np.zeros((n, t), bool)
    for k, row in enumerate(rows):
        size = len(row.ids)
        ids[k, :size], positions[k, :size] = row.ids, row.position
        segment[k, :size], is_prompt[k, :size] = row.segment, row.is_prompt
    mask = attention_mask(segment, is_prompt, p, image_sees_prompt=image_sees_prompt)
    where, targets, spread, weights = _answers(ids, segment, is_prompt, tokenizer)
    return {
        "ids": torch.from_numpy(ids),
        "positions": torch.from_numpy(positions),
        "mask": torch.from_numpy(mask),
        "where": torch.from_numpy(where),
        "targets": torch.from_numpy(targets),
        "target_weights": torch.from_numpy(spread),
        "weights": torch.from_numpy(weights),
        "nouns": _meant([(k * t, n) for k, row in enumerate(rows) for n in row.named]),
        "written": _meant([(k * t, n) for k, row in enumerate(rows) for n in row.written]),
    }


def _meant(named: list[tuple[int, Named]]) -> Meant:
    facts = [
        (start + n.column, n.left, n.number, n.kind, n.colour, n.asked, n.side, n.thing)
        + (start + n.side_column if n.side >= 0 else -1,)
        for start, n in named
    ]
    return Meant(
        torch.tensor(facts, dtype=torch.int64).view(-1, 9),
        torch.tensor([n.box for _, n in named]).view(-1, 4),
        torch.tensor([n.beside for _, n in named], dtype=torch.int64).view(-1, 4),
    )


def attention_mask(
    segment: np.ndarray, is_prompt: np.ndarray, p: int, *, image_sees_prompt: bool
) -> np.ndarray:
    """bool [rows, 1, p + t, p + t]: the prefix both ways, the answer causally, questions apart."""
    n, t = segment.shape
    mask = np.zeros((n, 1, p + t, p + t), bool)
    mask[:, :, :, :p] = True
    same = segment[:, :, None] == segment[:, None, :]
    earlier = np.tril(np.ones((t, t), bool))
    real = (segment >= 0)[:, None, :]
    mask[:, 0, p:, p:] = same & real & (is_prompt[:, None, :] | (earlier & ~is_prompt[:, :, None]))
    if image_sees_prompt:
        mask[:, 0, :p, p:] = is_prompt[:, None, :]
    return mask


def _answers(
    ids: np.ndarray, segment: np.ndarray, is_prompt: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n, t = ids.shape
    row, column = np.nonzero((segment >= 0) & ~is_prompt)
    where = row * t + column - 1
    token = ids[row, column]
    is_loc = (token >= tokenizer.first_loc) & (token < tokenizer.first_loc + N_LOC)
    targets = token[:, None] + np.arange(-2, 3) * LOC_STEP * is_loc[:, None]
    spread = np.where(is_loc[:, None], _SPREAD, np.array([0, 0, 1.0, 0, 0]))
    outside = is_loc[:, None] & (
        (targets < tokenizer.first_loc) | (targets >= tokenizer.first_loc + N_LOC)
    )
    targets, spread = np.where(outside, token[:, None], targets), np.where(outside, 0, spread)
    # A long answer weighs more than a short one, but not in proportion to its length.
    key = row * 64 + segment[row, column]
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    weights = counts[inverse] ** -0.65
    return where, targets, spread.astype(np.float32), weights.astype(np.float32)


def choose_scenes(
    facts: list[Facts], rng: Random, word_share: float, object_share: float
) -> list[int]:
    """Chooses scenes of a shard, and their order: so many with words, with objects."""
    indices = list(range(len(facts)))
    rng.shuffle(indices)
    words = [k for k in indices if facts[k][1] is not None][: round(SCENES_USED * word_share)]
    others = [k for k in indices if facts[k][0] and facts[k][1] is None]
    objects = [k for k in others if any(t.colour is None for t in facts[k][0])]
    shapes = [k for k in others if all(t.colour for t in facts[k][0])]
    n_objects = round(SCENES_USED * object_share)
    # A shard may hold fewer of one sort than asked for; the rest is made up of the other.
    chosen = (words + objects[:n_objects] + shapes + objects[n_objects:])[:SCENES_USED]
    rng.shuffle(chosen)
    return chosen


class Stream(IterableDataset[list[Batch]]):
    """The batches of a phase from a given step on, each in slices; the same for the same step on
    every run.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer_path: Path,
        config: PicoConfig,
        plan: BatchPlan,
        first: int,
        steps: int,
        shards: int,
    ) -> None:
        self.folder, self.tokenizer_path, self.config, self.plan = (
            folder,
            tokenizer_path,
            config,
            plan,
        )
        self.first, self.steps, self.shards = first, steps, shards

    def _read(self, index: int) -> tuple[np.ndarray, list[Facts]]:
        pictures, facts = read_shard(self.folder, index)
        chosen = choose_scenes(
            facts, Random(f"chosen {index}"), self.plan.word_share, self.plan.object_share
        )
        return np.stack([pictures[k] for k in chosen]), [facts[k] for k in chosen]

    def __iter__(self) -> Iterator[list[Batch]]:
        torch.set_num_threads(1)
        lexicon = Lexicon(Tokenizer(self.tokenizer_path))
        size = self.plan.n_pictures
        per_shard = SCENES_USED // size
        loaded = -1
        for step in range(self.first, self.first + self.steps):
            index = step // per_shard % self.shards
            # Every other time a shard comes round it is seen in a mirror.
            mirror = step // per_shard // self.shards % 2 == 1
            if index != loaded:
                wait_for_shard(self.folder, index)
                pictures, facts = self._read(index)
                if mirror:
                    pictures, facts = flipped(pictures, facts)
                loaded = index
            start = step % per_shard * size
            rng = Random(f"questions {step}")
            plan = self.plan
            if plan.true_every and step % plan.true_every == 0:
                plan = replace(plan, mode="true")
            yield [
                build(
                    pictures[k : k + SLICE], facts[k : k + SLICE], plan, lexicon, self.config, rng
                )
                for k in range(start, start + size, SLICE)
            ]
