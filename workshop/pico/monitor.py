"""Quick scores during training: every token of the answer must be the model's first choice, under
the true mask.

For answers that must match exactly this equals greedy decoding, at the price of one forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
import torch

from edgevlm.benchmarks.scenes.questions import LOC_STEP
from edgevlm.benchmarks.scenes.simple_scenes import simple_scene
from edgevlm.benchmarks.scenes.textured_scenes import Scene, make_scene
from workshop.pico.batches import Batch, BatchPlan, build
from workshop.pico.model import Pico, to_pixels
from workshop.pico.shards import model_input
from workshop.pico.targets import Lexicon
from workshop.pico.tokenizer import N_LOC, Tokenizer

N_SCENES = 192
CHUNK = 32


@lru_cache(maxsize=2)
def _scenes(make: Callable[[Random], Scene]) -> list[Scene]:
    return [make(Random(f"held out {k}")) for k in range(N_SCENES)]


@torch.no_grad()
def monitor(model: Pico, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of right answers for each task, on scenes of both drawing routines (``simple`` marks
    the second).
    """
    scores: dict[str, float] = {}
    lexicon = Lexicon(tokenizer)
    for prefix, make in (("", make_scene), ("simple ", simple_scene)):
        right: dict[str, list[bool]] = defaultdict(list)
        scenes = _scenes(make)
        for start in range(0, N_SCENES, CHUNK):
            chunk = scenes[start : start + CHUNK]
            pictures = np.stack([model_input(scene.picture) for scene in chunk])
            facts = [(scene.things, scene.word) for scene in chunk]
            plan = BatchPlan(CHUNK, true_rows=8, mode="true")
            batch = build(pictures, facts, plan, lexicon, model.config, Random(f"asked {start}"))
            for task, ok in _exact(model, batch, tokenizer):
                right[task].append(ok)
        scores |= {prefix + task: sum(v) / len(v) for task, v in sorted(right.items())}
    return scores


def _exact(model: Pico, batch: Batch, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    rows = model.image_rows(model.features(to_pixels(batch.pictures)))
    results: list[tuple[str, bool]] = []
    for texts in batch.texts:
        hidden = model.hidden(rows[texts.picture_of], texts.ids, texts.positions, texts.mask)
        chosen = model.logits(hidden.flatten(0, 1)[texts.where]).argmax(1)
        wanted = texts.targets[:, 2]
        is_loc = (wanted >= tokenizer.first_loc) & (wanted < tokenizer.first_loc + N_LOC)
        # Two and a half percent of the side: well inside IoU 0.5 for all but the smallest objects.
        close = is_loc & ((chosen - wanted).abs() <= 3 * LOC_STEP)
        right = (chosen == wanted) | close
        row = texts.where // texts.ids.shape[1]
        results += [(task, bool(right[row == k].all())) for k, task in enumerate(texts.tasks)]
    return results
