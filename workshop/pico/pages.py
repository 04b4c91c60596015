"""Draws what letters are learnt from: pages full of short words, twenty or thirty letters to a
picture, scenes with one word, and scenes without any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import ImageDraw

from edgevlm.benchmarks.scenes import drawing
from edgevlm.benchmarks.scenes.assets import WORD_FACES, Face, font, random_face
from edgevlm.benchmarks.scenes.textured_scenes import (
    Scene,
    Word,
    ink_rgb,
    make_scene,
    measured,
    picture_size,
    random_word,
    two_tones,
)
from workshop.pico.fonts import training_faces
from workshop.pico.letters import LONGEST
from workshop.pico.model import PicoConfig
from workshop.pico.shards import ORDERED_SHARE, SIDE, model_input
from workshop.pico.targets import LETTERS, letter_slots

PAGES_PER_SHARD = 4096
_KINDS = (("page", 44), ("word", 44), ("blank", 12))


def make_page(rng: Random, faces: Sequence[Face] = WORD_FACES) -> tuple[Scene, tuple[Word, ...]]:
    """A picture, and the words in it; a scene with a word has only that."""
    kind = rng.choices([kind for kind, _ in _KINDS], [share for _, share in _KINDS])[0]
    if kind == "page":
        return _full_page(rng, faces)
    if kind == "word":
        scene = make_scene(rng, word_share=1.0, faces=faces)
        assert scene.word is not None
        return scene, (scene.word,)
    return make_scene(rng, 0.0, ORDERED_SHARE), ()


def _full_page(rng: Random, faces: Sequence[Face]) -> tuple[Scene, tuple[Word, ...]]:
    size = width, height = picture_size(rng)
    tones = two_tones([], rng, any_emoji=False)
    canvas = drawing.background(size, tones, rng)
    draw = ImageDraw.Draw(canvas)
    words = []
    top = rng.uniform(-0.02, 0.1) * height
    while top < 0.92 * height:
        # From the smallest letters of a scene with one word to a quarter of the picture.
        pixels = max(8, round(height * rng.uniform(0.1, 0.3)))
        letters = font(random_face(faces, rng), pixels)
        ink = ink_rgb(tones, rng)
        space = letters.getlength(" ") * rng.uniform(1.0, 2.0)
        x, bottom = rng.uniform(0, 0.15) * width, top
        while True:
            text = random_word(rng)
            word, extent = measured(text, letters, x, top, size)
            if extent[2] > width or extent[3] > height:
                break
            draw.text((x, top), text, font=letters, fill=ink)
            words.append(word)
            x, bottom = extent[2] + space, max(bottom, extent[3])
        top = max(bottom, top + 0.5 * pixels) + rng.uniform(0.01, 0.08) * height
    return Scene(drawing.finish(canvas, rng), ()), tuple(words)


def write_pages(folder: Path, index: int) -> None:
    """Draws shard ``index`` of the pages unless it is there already: ``pages-NNNNN.npz`` with

    pictures uint8 [n, SIDE, SIDE, 3]; letter and index int8 [n, patches, slots], see targets.py;
    word int8 [n, LONGEST], its letters where it is the only one, else -1; blank bool [n], where
    there are no words.
    """
    path = pages_path(folder, index)
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    grid, n = PicoConfig().grid, PAGES_PER_SHARD
    pictures = np.empty((n, SIDE, SIDE, 3), np.uint8)
    word, blank = np.full((n, LONGEST), -1, np.int8), np.zeros(n, bool)
    slots = []
    for k in range(n):
        scene, words = make_page(Random(f"pages {index} {k}"), training_faces())
        pictures[k], blank[k] = model_input(scene.picture), not words
        slots.append(letter_slots(words, grid))
        if scene.word is not None:
            text = scene.word.text
            word[k, : len(text)] = [LETTERS.index(letter) for letter in text]
    letter, place = (np.stack(parts).astype(np.int8) for parts in zip(*slots, strict=True))
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, pictures=pictures, letter=letter, index=place, word=word, blank=blank)
    temporary.replace(path)


def read_words(folder: Path, shards: Iterable[int]) -> tuple[np.ndarray, list[str]]:
    """The pictures with one word, and the words, of some shards; draws what is not there."""
    pictures, texts = [], []
    for index in shards:
        write_pages(folder, index)
        shard = np.load(pages_path(folder, index))
        alone = shard["word"][:, 0] >= 0
        pictures.append(shard["pictures"][alone])
        texts += ["".join(LETTERS[k] for k in word if k >= 0) for word in shard["word"][alone]]
    return np.concatenate(pictures), texts


def pages_path(folder: Path, index: int) -> Path:
    """The path of a shard of pages."""
    return folder / f"pages-{index:05d}.npz"
