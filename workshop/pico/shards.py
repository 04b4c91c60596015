"""Scenes on disk: fixed-size shards, each the same for the same index on every machine with the
same fonts, drawn by separate processes.

A shard is ``NNNNN.npy`` (uint8 [scenes, SIDE, SIDE, 3], already resized as PaliGemma does it) and
``NNNNN.json`` (what is in each picture). The JSON file is written last, so a shard is complete
when it exists.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from edgevlm.benchmarks.scenes.textured_scenes import Scene, Thing, Word, make_scene
from workshop.pico.fonts import training_faces

SIDE = 112  # pixels of the model's square input
SCENES_PER_SHARD = 2048
WORD_SHARE = 0.2
ORDERED_SHARE = 0.3  # of the scenes without a word

Facts = tuple[tuple[Thing, ...], Word | None]


def model_input(picture: Image.Image) -> np.ndarray:
    """Any RGB picture -> uint8 [SIDE, SIDE, 3]; the aspect ratio is ignored, as PaliGemma does."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.uint8)


def write_shard(folder: Path, index: int) -> None:
    """Draws shard ``index`` unless it is there already."""
    facts_path = folder / f"{index:05d}.json"
    if facts_path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictures = np.empty((SCENES_PER_SHARD, SIDE, SIDE, 3), np.uint8)
    facts = []
    for k in range(SCENES_PER_SHARD):
        rng = Random(f"pico {index} {k}")
        scene = make_scene(rng, WORD_SHARE, ORDERED_SHARE, training_faces())
        pictures[k] = model_input(scene.picture)
        facts.append(_packed(scene))
    temporary = folder / f"{index:05d}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.save(file, pictures)
    temporary.replace(folder / f"{index:05d}.npy")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(facts_path)


def read_shard(folder: Path, index: int) -> tuple[np.ndarray, list[Facts]]:
    """The pictures (memory-mapped) and the facts of one shard."""
    pictures = np.load(folder / f"{index:05d}.npy", mmap_mode="r")
    facts = json.loads((folder / f"{index:05d}.json").read_text(encoding="utf-8"))
    return pictures, [_unpacked(entry) for entry in facts]


def wait_for_shard(folder: Path, index: int, *, seconds: float = 3600) -> None:
    """Returns when the shard is complete."""
    deadline = time.monotonic() + seconds
    while not (folder / f"{index:05d}.json").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"shard {index} did not appear in {folder}: is the drawing process running?"
            )
        time.sleep(0.5)


def draw_shards(folder: Path, indices: Sequence[int], workers: int) -> None:
    """Draws several shards with several processes, in order."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(write_shard, [(folder, index) for index in indices], chunksize=1)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(v), 5) for v in values]


def _packed(scene: Scene) -> list[object]:
    things = [[t.kind, t.colour, _rounded(t.box)] for t in scene.things]
    word = scene.word
    return [things, word and [word.text, _rounded(word.box), [_rounded(b) for b in word.letters]]]


def _unpacked(entry: list) -> Facts:  # type: ignore[type-arg]
    things, word = entry
    found = tuple(Thing(kind, colour, tuple(box)) for kind, colour, box in things)
    return found, word and Word(word[0], tuple(word[1]), tuple(tuple(b) for b in word[2]))
