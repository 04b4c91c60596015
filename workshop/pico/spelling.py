"""Trains the decoder to say what letters.py writes into the first image rows, forgetting nothing.

Only what other tasks hardly use learns: embeddings, queries, and units of the feed-forwards that
say next to nothing, in whose place new ones start. Its answers about scenes are held to those of
before. (Where all weights of the last layers learnt, captions were forgotten.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from edgevlm.benchmarks.scenes.questions import Question
from edgevlm.benchmarks.scenes.textured_scenes import Thing, Word
from workshop.pico.batches import Batch, BatchPlan, Stream, Texts, build
from workshop.pico.checkpoint import save_checkpoint
from workshop.pico.initial import NEW_CHANNELS, NEW_LAYER
from workshop.pico.model import DecoderLayer, Mlp, Pico, PicoConfig, to_pixels
from workshop.pico.optimiser import Muon
from workshop.pico.resumable import Resumable, falling
from workshop.pico.schedule import ReadingSchedule
from workshop.pico.shards import Facts
from workshop.pico.targets import LETTERS, Lexicon
from workshop.pico.tokenizer import EOS, Tokenizer

WORD_SLICE = 8
SPARE_SHARE = 1e-4  # of what a feed-forward adds, squared, by the units that are taken for new ones
SPARE_STEPS = 8  # whose scenes tell which these are


class SpareMlp(nn.Module):
    """A feed-forward with some ``units`` (int64 [n]) replaced by new ones, silent at first."""

    def __init__(self, kept: Mlp, units: Tensor, config: PicoConfig) -> None:
        super().__init__()
        self.kept, self.units = kept, units
        self.new = Mlp(replace(config, ff=len(units)))
        for linear in (self.new.gate_proj, self.new.up_proj):
            nn.init.normal_(linear.weight, std=config.width**-0.5)
        nn.init.zeros_(self.new.down_proj.weight)
        with torch.no_grad():
            kept.down_proj.weight[:, units] = 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        out: Tensor = self.kept(x) + self.new(x)
        return out

    @torch.no_grad()
    def joined(self) -> Mlp:
        """One feed-forward that does the same."""
        self.kept.gate_proj.weight[self.units] = self.new.gate_proj.weight
        self.kept.up_proj.weight[self.units] = self.new.up_proj.weight
        self.kept.down_proj.weight[:, self.units] = self.new.down_proj.weight
        return self.kept


@torch.no_grad()
def spare_units(model: Pico, scenes: Iterable[Batch]) -> list[Tensor]:
    """The units of each decoder layer, int64 [n], that add next to nothing to what is said of
    scenes.
    """
    feeds = [cast(DecoderLayer, layer).mlp for layer in model.language_model.model.layers]
    said: list[Tensor] = []
    hooks = [
        feed.down_proj.register_forward_pre_hook(lambda _, inputs: said.append(inputs[0]))
        for feed in feeds
    ]
    loudness = [torch.zeros(model.config.ff) for _ in feeds]
    for batch in scenes:
        rows = _image_rows(model, batch.pictures)
        for texts in batch.texts:
            said.clear()
            _log_probs(model, rows, texts)
            # What fills a row up does not see itself.
            real = texts.mask[:, 0].diagonal(dim1=1, dim2=2)
            for total, units in zip(loudness, said, strict=True):
                total += units[real[:, -units.shape[1] :]].square().sum(0)
    for hook in hooks:
        hook.remove()
    spare = []
    for feed, total in zip(feeds, loudness, strict=True):
        added, order = (total * feed.down_proj.weight.square().sum(0)).sort()
        spare.append(order[added.cumsum(0) < SPARE_SHARE * added.sum()])
    return spare


class SpellingTraining(Resumable):
    """Teaches ``model`` to answer ``ocr``; ``spare`` are the units of spare_units.

    The embeddings that learn are those of the prompt and of letters, and the end's in the
    decoder's NEW_CHANNELS; of the queries of its NEW_LAYER, what they make of these channels, which
    hold nothing where text stands.
    """

    LOOKED_WEIGHT = 0.5
    KEPT_WEIGHT = 30.0  # of what is said of scenes
    SILENCE_WEIGHT = 0.2
    N_SILENT = 4  # scenes of a slice that are asked to be read, and have no words

    def __init__(
        self,
        folder: Path,
        model: Pico,
        tokenizer_path: Path,
        schedule: ReadingSchedule,
        spare: Sequence[Tensor],
    ) -> None:
        torch.manual_seed(1)
        self.folder, self.schedule, self.tokenizer_path = folder, schedule, tokenizer_path
        self.tokenizer = Tokenizer(tokenizer_path)
        self.lexicon = Lexicon(self.tokenizer)
        self.teacher = model.requires_grad_(requires_grad=False)
        self.model = deepcopy(model)
        decoder = self.model.language_model.model
        feeds = []
        for layer, units in zip(decoder.layers, spare, strict=True):
            layer.mlp = SpareMlp(cast(Mlp, layer.mlp), units, model.config)
            feeds += list(layer.mlp.new.parameters())
        table = decoder.embed_tokens.weight.requires_grad_()
        queries = cast(DecoderLayer, decoder.layers[NEW_LAYER]).self_attn.q_proj.weight
        queries.requires_grad_()
        self.free = [(table, torch.zeros_like(table)), (queries, torch.zeros_like(queries))]
        self.free[0][1][self._own_tokens()] = 1
        self.free[0][1][EOS, -NEW_CHANNELS:] = 1
        self.free[1][1][:, -NEW_CHANNELS:] = 1
        super().__init__(
            folder / "spelling.pt",
            {name: p for name, p in self.model.named_parameters() if p.requires_grad},
        )
        self.optimisers = [
            torch.optim.Adam([table, queries], schedule.spelling_lr, betas=(0.9, 0.98)),
            Muon(feeds, schedule.spelling_muon_lr, self.threads, decay=schedule.decay),
        ]

    def _own_tokens(self) -> list[int]:
        _, *prompt, _ = self.tokenizer.prompt_ids("ocr")
        *letters, _ = self.tokenizer.answer_ids(LETTERS, "ocr")
        return prompt + letters

    def mask_gradients(self) -> None:
        """Keeps all of the embeddings and queries but the free ones as they are."""
        for p, free in self.free:
            assert p.grad is not None
            p.grad.mul_(free)

    def run(self, pictures: np.ndarray, words: list[str], *, save_every: int) -> None:
        """Trains on pictures of words and on the scenes of ``folder``/data to the end of the
        schedule; the checkpoint is ``folder``/hf-latest.
        """
        steps = self.schedule.spelling_steps
        scenes = scene_stream(
            self.folder,
            self.tokenizer_path,
            self.model.config,
            self.schedule,
            self.step,
            steps - self.step,
        )
        for batch in DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4):
            self.train_step(batch, list(self._some(pictures, words)))
            if self.step % 20 == 0:
                self.report(steps)
            if self.step % save_every == 0 or self.step == steps:
                self.save()
                self.save_checkpoint()

    def train_step(self, scenes: list[Batch], words: list[Batch]) -> None:
        """One update with slices of scenes and of words."""
        parts = [(self._word_loss, part, len(words)) for part in words]
        parts += [(self._scene_loss, part, len(scenes)) for part in scenes]
        factor = falling(self.step, self.schedule.spelling_steps, 30)
        self.update(factor, parts, lambda part: part[0](part[1]) / part[2])

    def _some(self, pictures: np.ndarray, words: list[str]) -> Iterator[Batch]:
        rng = np.random.default_rng(self.step)
        chosen = rng.choice(len(words), self.schedule.words, replace=False)
        for start in range(0, len(chosen), WORD_SLICE):
            some = chosen[start : start + WORD_SLICE]
            yield self._asked(pictures[some], [words[k] for k in some])

    def _asked(self, pictures: np.ndarray, words: list[str]) -> Batch:
        facts: list[Facts] = [((), Word(word, (0, 0, 1, 1), ())) for word in words]
        plan = BatchPlan(len(words), mode="true", true_rows=1, ask=_read)
        return build(pictures, facts, plan, self.lexicon, self.model.config, Random(self.step))

    def _word_loss(self, batch: Batch) -> Tensor:
        rows = _image_rows(self.model, batch.pictures)
        losses, looked = [], []
        for texts in batch.texts:
            seen: list[Tensor] = []
            losses.append(_answer_loss(_log_probs(self.model, rows, texts, seen), texts))
            looked.append(self._looked(texts, seen[NEW_LAYER - 1]))
        answer, attention = torch.cat(losses).mean(), torch.cat(looked).mean()
        self.note({"word": answer, "looked": attention})
        return answer + self.LOOKED_WEIGHT * attention

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
        rows = _image_rows(self.model, batch.pictures)
        total, weight = torch.zeros(()), torch.zeros(())
        for texts in batch.texts:
            log_p = _log_probs(self.model, rows, texts)
            with torch.no_grad():
                before = _log_probs(self.teacher, rows, texts)
            total = total + ((before.exp() * (before - log_p)).sum(1) * texts.weights).sum()
            weight = weight + texts.weights.sum()
        kept, silence = total / weight, self._silence(batch, rows)
        self.note({"kept": kept, "silence": silence})
        return self.KEPT_WEIGHT * kept + self.SILENCE_WEIGHT * silence

    def _silence(self, batch: Batch, rows: Tensor) -> Tensor:
        """The loss of the end token as the answer to ``ocr`` where there is nothing to read."""
        some = batch.pictures[: self.N_SILENT].numpy()
        (texts,) = self._asked(some, [""] * len(some)).texts
        return _answer_loss(_log_probs(self.model, rows, texts), texts).mean()

    def save_checkpoint(self) -> None:
        """Writes the averaged weights, as one pico again, to ``folder``/hf-latest."""
        averaged = deepcopy(self.model)
        with torch.no_grad():
            for name, p in averaged.named_parameters():
                if name in self.average:
                    p.copy_(self.average[name])
        for layer in averaged.language_model.model.layers:
            layer.mlp = cast(SpareMlp, layer.mlp).joined()
        save_checkpoint(averaged, self.tokenizer_path, self.folder / "hf-latest")


def scene_stream(
    folder: Path,
    tokenizer_path: Path,
    config: PicoConfig,
    schedule: ReadingSchedule,
    first: int,
    steps: int,
) -> Stream:
    """The scenes of ``folder``/data, which what was known before is held to."""
    plan = BatchPlan(schedule.scenes, true_every=4, word_share=0.0, object_share=0.3)
    data = folder / "data"
    return Stream(data, tokenizer_path, config, plan, first, steps, schedule.scene_shards)


def _read(things: tuple[Thing, ...], word: Word | None, rng: Random) -> Iterator[Question]:
    del things, rng
    assert word is not None
    yield Question("ocr", word.text, "ocr")


@torch.no_grad()
def _image_rows(model: Pico, pictures: Tensor) -> Tensor:
    return model.image_rows(model.features(to_pixels(pictures)))


def _log_probs(model: Pico, rows: Tensor, texts: Texts, seen: list[Tensor] | None = None) -> Tensor:
    states = model.hidden(rows[texts.picture_of], texts.ids, texts.positions, texts.mask, seen)
    return F.log_softmax(model.logits(states.flatten(0, 1)[texts.where]), -1)


def _answer_loss(log_p: Tensor, texts: Texts) -> Tensor:
    return -log_p.gather(1, texts.targets[:, 2:3])[:, 0]
