"""Teaches a trained pico to read: letters in channels of their own (letters.py), then the decoder
to spell what these write into the first image rows (spelling.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workshop.pico.checkpoint import load_checkpoint
from workshop.pico.letters import LetterChannels, LetterHeads, Older, Printed
from workshop.pico.model import Pico
from workshop.pico.optimiser import Muon
from workshop.pico.pages import read_words
from workshop.pico.remembered import Pages
from workshop.pico.resumable import Resumable, falling
from workshop.pico.schedule import ReadingSchedule
from workshop.pico.spelling import (
    SPARE_STEPS,
    SpellingTraining,
    scene_stream,
    spare_units,
)
from workshop.pico.wider import widened

SLICES = 4  # of a batch, each for the thread that is free
ROUGHNESS = 0.06  # of the letters' channels: about twice what int8 rounds
LETTERS_FILE = "letters.safetensors"


class LetterTraining(Resumable):
    """The letters' channels on remembered pages."""

    def __init__(self, folder: Path, model: Pico, schedule: ReadingSchedule) -> None:
        torch.manual_seed(0)
        config = model.config
        self.folder, self.schedule = folder, schedule
        self.letters = LetterChannels(
            config.vision_width, config.vision_layers, config.grid, ROUGHNESS
        )
        self.heads = LetterHeads()
        super().__init__(
            folder / "letters.pt",
            dict(self.letters.named_parameters(prefix="letters"))
            | dict(self.heads.named_parameters(prefix="heads")),
        )
        matrices = [p for p in self.letters.layers.parameters() if p.ndim == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.trained.values() if id(p) not in taken]
        muon = Muon(matrices, schedule.letter_muon_lr, self.threads, decay=schedule.decay)
        self.optimisers = [muon, torch.optim.AdamW(rest, lr=schedule.letter_lr, betas=(0.9, 0.98))]
        self.pages = Pages(folder / "pages", model, schedule.page_shards)

    def run(self, *, save_every: int, log_every: int = 100) -> None:
        """Trains to the end of the schedule and writes ``letters.safetensors``, averaged."""
        steps, share = self.schedule.letter_steps, self.schedule.letter_pictures // SLICES
        while self.step < steps:
            rng = np.random.default_rng(self.step)
            shown = max(0.0, 1 - self.step / self.schedule.shown_steps)
            parts = [self.pages.some(share, rng) for _ in range(SLICES)]
            self.update(
                falling(self.step, steps, 50),
                parts,
                lambda part, shown=shown: self._loss(part[0], part[1], shown),
            )
            if self.step % log_every == 0:
                self.report(steps)
            if self.step % save_every == 0 or self.step == steps:
                self.save()
        kept = {n: v for n, v in self.average.items() if n.startswith(("letters.", "heads.code."))}
        kept["loudness"] = self.pages.loudness
        save_file({n: v.half().contiguous() for n, v in kept.items()}, self.folder / LETTERS_FILE)

    def _loss(self, older: Older, printed: Printed, shown: float) -> Tensor:
        losses = self.heads.losses(self.letters, older, printed, shown)
        self.note(losses)
        return torch.stack(list(losses.values())).sum() / SLICES


def with_letters(model: Pico, path: Path) -> Pico:
    """A pico with the channels of a file that LetterTraining wrote."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    config = model.config
    letters = LetterChannels(config.vision_width, config.vision_layers, config.grid)
    code = LetterHeads().code
    for prefix, module in (("letters.", letters), ("heads.code.", code)):
        module.load_state_dict(
            {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        )
    return widened(model, letters, code, weights["loudness"])


def teach_reading(
    folder: Path, checkpoint: Path, schedule: ReadingSchedule, save_every: int
) -> None:
    """Trains letters, then spelling. A file of letters that is there is not trained again."""
    model = load_checkpoint(checkpoint)
    if not (folder / LETTERS_FILE).exists():
        letters = LetterTraining(folder, model, schedule)
        letters.resume()
        letters.run(save_every=save_every)
    wide = with_letters(model, folder / LETTERS_FILE)
    tokenizer = checkpoint / "tokenizer.model"
    scenes = scene_stream(folder, tokenizer, wide.config, schedule, 0, SPARE_STEPS)
    spare = spare_units(wide, (batch for slices in scenes for batch in slices))
    spelling = SpellingTraining(folder, wide, tokenizer, schedule, spare)
    spelling.resume()
    new = range(schedule.page_shards, schedule.page_shards + schedule.word_shards)
    spelling.run(*read_words(folder / "pages", new), save_every=save_every)
