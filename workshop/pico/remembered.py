"""A cache on disk of a trained encoder's outputs for pages.

The encoder stays as it is while its letters' channels learn, so it need see a picture only once: a
step is several times as fast.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from workshop.pico.letters import Older, Printed
from workshop.pico.model import Pico
from workshop.pico.pages import pages_path, write_pages
from workshop.pico.wider import older_state

log = logging.getLogger(__name__)

CHUNK = 48  # pictures that the encoder sees at a time


class Pages:
    """Shards of pages, drawn when they are not there, with what the older channels make of them.

    Values are stored in steps of a 127th of nearly the largest of their part.
    """

    def __init__(self, folder: Path, model: Pico, shards: int) -> None:
        self.folder, self.model = folder, model
        width = model.config.vision_width
        first = self._pictures(0)[:256]
        older = older_state(model, torch.from_numpy(first))
        parts = torch.unflatten(older.seen, -1, (-1, width)).abs().movedim(2, 0).flatten(1)
        largest = parts.kthvalue(int(0.9998 * parts.shape[1]), dim=1).values
        self.unit = (largest / 127).repeat_interleave(width)
        self.loudness = older.loudness.mean((0, 1))
        self.shards = []
        for index in range(shards):
            self._remember(index)
            facts = np.load(self._path(index, ".npz"))
            self.shards.append(
                (
                    np.load(self._path(index, ".npy"), mmap_mode="r"),
                    torch.from_numpy(facts["loudness"]),
                    {name: torch.from_numpy(facts[name]) for name in facts if name != "loudness"},
                )
            )

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"older-{index:05d}{suffix}"

    def _pictures(self, index: int) -> np.ndarray:
        write_pages(self.folder, index)
        return np.asarray(np.load(pages_path(self.folder, index))["pictures"])

    def _remember(self, index: int) -> None:
        if self._path(index, ".npz").exists():
            return
        pictures = self._pictures(index)
        shape = (len(pictures), self.model.config.n_image_tokens, len(self.unit))
        seen = np.lib.format.open_memmap(self._path(index, ".npy"), "w+", np.int8, shape)
        loudness = []
        for start in range(0, len(pictures), CHUNK):
            older = older_state(self.model, torch.from_numpy(pictures[start : start + CHUNK]))
            steps = (older.seen / self.unit).round_().clamp_(-127, 127)
            seen[start : start + CHUNK] = steps.to(torch.int8).numpy()
            loudness.append(older.loudness / self.loudness)
        seen.flush()
        facts = dict(np.load(pages_path(self.folder, index)))
        del facts["pictures"]
        # Written last: what is there is complete.
        np.savez(self._path(index, ".npz"), loudness=torch.cat(loudness).half().numpy(), **facts)
        log.info("shard %d of the pages is remembered", index)

    def some(self, count: int, rng: np.random.Generator) -> tuple[Older, Printed]:
        """Pages of one shard, drawn by chance."""
        seen, loudness, facts = self.shards[rng.integers(len(self.shards))]
        chosen = np.sort(rng.choice(len(seen), count, replace=False))
        older = Older(torch.from_numpy(seen[chosen]).float() * self.unit, loudness[chosen].float())
        letter, index, word = (facts[name][chosen].long() for name in ("letter", "index", "word"))
        return older, Printed(letter, index, word, word[:, 0] >= 0, facts["blank"][chosen])
