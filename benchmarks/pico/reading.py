"""Teaches a trained pico to read: letters in channels of their own (letters.py), then the decoder
to spell what these write into the first image rows.

What pico could do before is kept: the encoder's older channels are as they were, and of the decoder
only what other tasks hardly use is changed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from edgevlm.benchmarks.pico.batches import Batch, BatchPlan, Stream, Texts, build
from edgevlm.benchmarks.pico.checkpoint import load_checkpoint, save_checkpoint
from edgevlm.benchmarks.pico.initial import NEW_CHANNELS, NEW_LAYER
from edgevlm.benchmarks.pico.letters import LetterChannels, LetterHeads, Older, Printed
from edgevlm.benchmarks.pico.model import DecoderLayer, Pico, to_pixels
from edgevlm.benchmarks.pico.optimiser import Muon, set_gradients
from edgevlm.benchmarks.pico.pages import read_words
from edgevlm.benchmarks.pico.questions import Question
from edgevlm.benchmarks.pico.remembered import Pages
from edgevlm.benchmarks.pico.scenes import Thing, Word
from edgevlm.benchmarks.pico.shards import Facts
from edgevlm.benchmarks.pico.targets import LETTERS, Lexicon
from edgevlm.benchmarks.pico.tokenizer import EOS, Tokenizer
from edgevlm.benchmarks.pico.wider import widened

log = logging.getLogger(__name__)

N_THREADS = 2
SLICES = 4  # of a batch, each for the thread that is free
ROUGHNESS = 0.06  # of the letters' channels: about twice what int8 rounds
DECAY = 0.1  # of their matrices, which no norm holds
WORD_SLICE = 8
LETTERS_FILE = "letters.safetensors"


@dataclass(frozen=True)
class ReadingSchedule:
    """Steps and learning rates of the two parts; the rates fall to zero in a straight line."""

    letter_steps: int = 12000
    letter_pictures: int = 96
    letter_muon_lr: float = 0.01
    letter_lr: float = 2e-3
    shown_steps: int = 800  # how long heads are shown their neighbours, less and less
    spelling_steps: int = 750
    words: int = 40
    scenes: int = 8
    spelling_lr: float = 4e-3
    page_shards: int = 22
    scene_shards: int = 12


def _falling(step: int, steps: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) * (1 - step / steps)


class _Training:
    """What both parts share: steps that can be resumed, averaged weights, means of the losses."""

    def __init__(self, snapshot: Path, trained: Mapping[str, Tensor]) -> None:
        self.snapshot, self.trained = snapshot, trained
        self.average = {name: value.detach().clone() for name, value in trained.items()}
        self.threads = ThreadPoolExecutor(N_THREADS)
        self.optimisers: list[torch.optim.Optimizer] = []
        self.step = 0
        self.sums: dict[str, list[float]] = defaultdict(list)

    def resume(self) -> None:
        """Continues from the snapshot if there is one."""
        if not self.snapshot.exists():
            return
        state = torch.load(self.snapshot, weights_only=True)
        self.step = state["step"]
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(state["weights"][name])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def save(self) -> None:
        """Writes the snapshot."""
        state: dict[str, Any] = {
            "step": self.step,
            "weights": dict(self.trained),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        temporary = self.snapshot.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.snapshot)

    def update(self, factor: float, parts: list[Any], loss: Any) -> None:
        """One step of all optimisers at a share of their rates; ``loss`` takes every part."""
        params = [p for o in self.optimisers for g in o.param_groups for p in g["params"]]
        set_gradients(params, parts, loss, self.threads)
        self.mask_gradients()
        torch.nn.utils.clip_grad_norm_(params, 5.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * factor
            optimiser.step()
        with torch.no_grad():
            for name, value in self.trained.items():
                self.average[name].lerp_(value, 0.01)
        self.step += 1

    def mask_gradients(self) -> None:
        """Where not all of a parameter may change."""

    def note(self, losses: dict[str, Tensor]) -> None:
        """Remembers losses for the next report."""
        for name, value in losses.items():
            self.sums[name].append(float(value.detach()))

    def report(self, steps: int) -> None:
        """Logs the means since the last report."""
        means = "  ".join(f"{name} {np.mean(v):.3f}" for name, v in self.sums.items())
        log.info("step %d/%d  %s", self.step, steps, means)
        self.sums.clear()


class LetterTraining(_Training):
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
        muon = Muon(matrices, schedule.letter_muon_lr, self.threads, decay=DECAY)
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
                _falling(self.step, steps, 50),
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


class SpellingTraining(_Training):
    """What other tasks hardly use learns to say the letters of the first image rows: embeddings of
    the prompt ``ocr`` and of letters, and what the queries of the decoder's NEW_LAYER make of its
    NEW_CHANNELS, which hold nothing where text stands. What is said of scenes is held to what was
    said before.

    All weights of the last layers learn to spell better, and forget captions.
    """

    ATTENTION_WEIGHT = 0.5
    KEPT_WEIGHT = 10.0  # of what is said of scenes

    def __init__(
        self, folder: Path, model: Pico, tokenizer_path: Path, schedule: ReadingSchedule
    ) -> None:
        torch.manual_seed(1)
        self.folder, self.schedule, self.model = folder, schedule, model
        self.tokenizer_path = tokenizer_path
        self.tokenizer = Tokenizer(tokenizer_path)
        self.lexicon = Lexicon(self.tokenizer)
        self.teacher = Pico(model.config)
        self.teacher.load_state_dict(model.state_dict())
        model.requires_grad_(requires_grad=False)
        decoder = model.language_model.model
        table = decoder.embed_tokens.weight
        layer = cast(DecoderLayer, decoder.layers[NEW_LAYER])
        queries = layer.self_attn.q_proj.weight
        self.free = [torch.zeros_like(table), torch.zeros_like(queries)]
        self.free[0][self._own_tokens()] = 1
        self.free[0][EOS, -NEW_CHANNELS:] = 1
        self.free[1][:, -NEW_CHANNELS:] = 1
        super().__init__(folder / "spelling.pt", {"table": table, "queries": queries})
        self.params = [p.requires_grad_() for p in (table, queries)]
        self.optimisers = [torch.optim.Adam(self.params, schedule.spelling_lr, betas=(0.9, 0.98))]

    def _own_tokens(self) -> list[int]:
        _, *prompt, _ = self.tokenizer.prompt_ids("ocr")
        *letters, _ = self.tokenizer.answer_ids(LETTERS, "ocr")
        return prompt + letters

    def mask_gradients(self) -> None:
        """Keeps all weights but the free ones as they are."""
        for p, free in zip(self.params, self.free, strict=True):
            assert p.grad is not None
            p.grad.mul_(free)

    def run(self, pictures: np.ndarray, texts: list[str], *, save_every: int) -> None:
        """Trains on pictures of words and on the scenes of ``folder``/data to the end of the
        schedule; the checkpoint is ``folder``/hf-latest.
        """
        steps, schedule = self.schedule.spelling_steps, self.schedule
        plan = BatchPlan(schedule.scenes, true_every=4, word_share=0.0, object_share=0.3)
        scenes = Stream(
            self.folder / "data",
            self.tokenizer_path,
            self.model.config,
            plan,
            self.step,
            steps - self.step,
            schedule.scene_shards,
        )
        for batch in DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4):
            self.train_step(batch, list(self._words(pictures, texts)))
            if self.step % 20 == 0:
                self.report(steps)
            if self.step % save_every == 0 or self.step == steps:
                self.save()
                self._save_checkpoint()

    def train_step(self, scenes: list[Batch], words: list[Batch]) -> None:
        """One update with slices of scenes and of words, each asked with true rows or packed."""
        parts = [(self._word_loss, part, len(words)) for part in words]
        parts += [(self._scene_loss, part, len(scenes)) for part in scenes]
        factor = _falling(self.step, self.schedule.spelling_steps, 30)
        self.update(factor, parts, lambda part: part[0](part[1]) / part[2])

    def _words(self, pictures: np.ndarray, texts: list[str]) -> Iterator[Batch]:
        rng = np.random.default_rng(self.step)
        chosen = rng.choice(len(texts), self.schedule.words, replace=False)
        plan = BatchPlan(WORD_SLICE, mode="true", true_rows=1, ask=_read)
        for start in range(0, len(chosen), WORD_SLICE):
            some = chosen[start : start + WORD_SLICE]
            facts: list[Facts] = [((), Word(texts[k], (0, 0, 1, 1), ())) for k in some]
            asked = Random(f"words {self.step} {start}")
            config = self.model.config
            yield build(pictures[some], facts, plan, self.lexicon, config, asked)

    @torch.no_grad()
    def _rows(self, batch: Batch) -> Tensor:
        return self.model.image_rows(self.model.features(to_pixels(batch.pictures)))

    def _word_loss(self, batch: Batch) -> Tensor:
        rows = self._rows(batch)
        losses, looked = [], []
        for texts in batch.texts:
            seen: list[Tensor] = []
            log_p = self._log_probs(self.model, rows, texts, seen)
            losses.append(-log_p.gather(1, texts.targets[:, 2:3])[:, 0])
            looked.append(self._looked(texts, seen[NEW_LAYER - 1]))
        answer, attention = torch.cat(losses).mean(), torch.cat(looked).mean()
        self.note({"word": answer, "looked": attention})
        return answer + self.ATTENTION_WEIGHT * attention

    def _looked(self, texts: Texts, before: Tensor) -> Tensor:
        """-log of the attention of each letter's state that falls on the letter's image row."""
        n_text = texts.ids.shape[1]
        n_rows = before.shape[1] - n_text
        row = texts.where // n_text
        first = torch.full((len(texts.ids),), n_rows + n_text**2 * len(texts.ids))
        first = first.scatter_reduce(0, row, texts.where, "amin")
        positions = torch.arange(n_rows).expand(len(texts.ids), -1)
        positions = torch.cat([positions, texts.positions], 1)
        layer = cast(DecoderLayer, self.model.language_model.model.layers[NEW_LAYER])
        column = n_rows + texts.where % n_text
        log_p = layer.log_attention(before, positions, texts.mask, row, column, 1)[:, 0]
        return -log_p.gather(1, (texts.where - first[row])[:, None])

    def _scene_loss(self, batch: Batch) -> Tensor:
        rows = self._rows(batch)
        losses, weights = [], []
        for texts in batch.texts:
            log_p = self._log_probs(self.model, rows, texts)
            with torch.no_grad():
                before = self._log_probs(self.teacher, rows, texts)
            kept = (before.exp() * (before - log_p)).sum(1)
            self.note({"kept": kept.mean()})
            losses.append(kept)
            weights.append(texts.weights)
        loss, weight = torch.cat(losses), torch.cat(weights)
        return self.KEPT_WEIGHT * (loss * weight).sum() / weight.sum()

    def _log_probs(
        self, model: Pico, rows: Tensor, texts: Texts, seen: list[Tensor] | None = None
    ) -> Tensor:
        states = model.hidden(rows[texts.picture_of], texts.ids, texts.positions, texts.mask, seen)
        return F.log_softmax(model.logits(states.flatten(0, 1)[texts.where]), -1)

    def _save_checkpoint(self) -> None:
        averaged = Pico(self.model.config)
        averaged.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            averaged.language_model.model.embed_tokens.weight.copy_(self.average["table"])
            layer = cast(DecoderLayer, averaged.language_model.model.layers[NEW_LAYER])
            layer.self_attn.q_proj.weight.copy_(self.average["queries"])
        save_checkpoint(averaged, self.tokenizer_path, self.folder / "hf-latest")


def _read(things: tuple[Thing, ...], word: Word | None, rng: Random) -> Iterator[Question]:
    del things, rng
    assert word is not None
    yield Question("ocr", word.text, "ocr")


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
    """Both parts, one after the other. A file of letters that is there is not trained again."""
    model = load_checkpoint(checkpoint)
    if not (folder / LETTERS_FILE).exists():
        letters = LetterTraining(folder, model, schedule)
        letters.resume()
        letters.run(save_every=save_every)
    wide = with_letters(model, folder / LETTERS_FILE)
    spelling = SpellingTraining(folder, wide, checkpoint / "tokenizer.model", schedule)
    spelling.resume()
    spelling.run(*read_words(folder / "pages", schedule.page_shards), save_every=save_every)
