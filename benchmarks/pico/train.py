"""Trains pico: the encoder alone on patch targets, then everything on packed questions, then with
the true mask.

The schedule counts steps, never minutes, and every snapshot can be resumed.
"""

from __future__ import annotations

import csv
import logging
import resource
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from edgevlm.benchmarks.pico.batches import Batch, BatchPlan, Stream
from edgevlm.benchmarks.pico.checkpoint import load_checkpoint, save_checkpoint
from edgevlm.benchmarks.pico.heads import (
    NOUN_LAYER,
    WRITTEN_LAYER,
    MaskHead,
    Neighbours,
    NounAttention,
    PatchHeads,
    Referents,
    RowHeads,
)
from edgevlm.benchmarks.pico.initial import NEW, smooth_places, whiten_patches, with_new_layers
from edgevlm.benchmarks.pico.model import Pico, PicoConfig, VisionLayer, to_pixels
from edgevlm.benchmarks.pico.monitor import monitor
from edgevlm.benchmarks.pico.optimiser import make_optimisers
from edgevlm.benchmarks.pico.shards import read_shard, wait_for_shard
from edgevlm.benchmarks.pico.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

N_THREADS = 2
MASK_WEIGHT = 5.0


@dataclass(frozen=True)
class Schedule:
    """Steps of the three phases and the learning rates. The rates fall to zero over the last
    ``decay`` share.
    """

    vision_steps: int = 1600
    packed_steps: int = 2400
    true_steps: int = 800
    vision_pictures: int = 64
    packed_pictures: int = 48
    true_pictures: int = 48
    lr: float = 2e-3
    muon_lr: float = 0.016
    vision_share: float = 0.6  # of the rates above, once the decoder is trained too
    inherited: float | None = None  # of the decoder's rates, for weights that were there before
    true_every: int = 5  # in the packed phase: how often a step has the true mask
    word_share: float = 0.05  # of the pictures
    object_share: float = 0.25
    head_weight: float = 0.5  # of the patch targets, once there are answers to learn
    referent_weight: float = 0.3  # of what nouns, captions and boxes refer to
    decay: float = 0.9
    shards: int = 140

    @property
    def total(self) -> int:
        """All steps."""
        return self.vision_steps + self.packed_steps + self.true_steps

    def phase(self, step: int) -> tuple[str, int]:
        """The phase of a step and the step at which it ends."""
        ends = (self.vision_steps, self.vision_steps + self.packed_steps, self.total)
        for mode, end in zip(("vision", "packed", "true"), ends, strict=True):
            if step < end:
                return mode, end
        raise ValueError(f"step {step} is past the end ({self.total})")

    def rates(self, step: int) -> tuple[float, float, float]:
        """Factors on the rates of the encoder, of the decoder and of layers and heads that are new
        to the model.
        """
        left = (self.total - step) / (self.decay * (self.total - self.vision_steps))
        fall = min(1.0, left)
        warm = min(1.0, (step + 1) / 100)
        if step < self.vision_steps:
            return warm, 0.3, warm
        new = fall * min(1.0, (step - self.vision_steps + 1) / 50)
        inherited = 1.0 if self.inherited is None else self.inherited
        return fall * self.vision_share, new * inherited, new


# From trained weights, with a new last layer in the encoder and a new second one in the decoder:
# the encoder's learns alone what is beside what, then the decoder to say it. The rest of the
# encoder stays as it is. A third of these steps were too few (README.md).
CONTINUED = Schedule(
    vision_steps=450,
    packed_steps=2000,
    true_steps=150,
    vision_pictures=96,
    muon_lr=0.02,
    vision_share=0.0,
    inherited=0.25,
    true_every=8,
    word_share=0.0,
    decay=0.7,
)


class Trainer:
    """The model with everything needed to continue its training."""

    def __init__(self, folder: Path, config: PicoConfig, schedule: Schedule) -> None:
        self.folder, self.config, self.schedule = folder, config, schedule
        self.tokenizer_path = folder / "tokenizer.model"
        if not self.tokenizer_path.exists():
            train_tokenizer(self.tokenizer_path)
        self.tokenizer = Tokenizer(self.tokenizer_path)
        torch.manual_seed(0)
        self.model = Pico(config)
        smooth_places(self.model, self.tokenizer.first_loc)
        self.heads = PatchHeads(config.vision_width)
        self.row_heads = RowHeads(config.width, self.tokenizer)
        self.noun_attention = NounAttention(self.tokenizer)
        self.nouns = Referents(config.width, NOUN_LAYER)
        self.written = Referents(config.width, WRITTEN_LAYER)
        self.mask_head = MaskHead(config.vision_width)
        self.neighbours = Neighbours(config.vision_width)
        self.all_heads = nn.ModuleList(
            [
                self.heads,
                self.row_heads,
                self.mask_head,
                self.nouns,
                self.written,
                self.neighbours,
            ]
        )
        self.threads = ThreadPoolExecutor(N_THREADS)
        self.optimisers = [
            make_optimisers(part, schedule.lr, schedule.muon_lr, self.threads)
            for part in self._parts()
        ]
        self.optimisers[-1].append(
            torch.optim.AdamW(self.all_heads.parameters(), lr=schedule.lr),
        )
        self.base_rates = [
            [g["lr"] for o in part for g in o.param_groups] for part in self.optimisers
        ]
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step = 0
        self.sums: dict[str, list[float]] = defaultdict(list)

    def _parts(self) -> list[list[tuple[str, nn.Parameter]]]:
        """The weights of the encoder, of the decoder, and those that are new to the model."""
        added = () if self.schedule.inherited is None else NEW
        vision: list[tuple[str, nn.Parameter]] = []
        language: list[tuple[str, nn.Parameter]] = []
        new: list[tuple[str, nn.Parameter]] = []
        for name, p in self.model.named_parameters():
            part = vision if name.startswith("vision_tower.") else language
            (new if name.startswith(added) else part).append((name, p))
        if self.schedule.vision_share == 0:
            for _, p in vision:
                p.requires_grad_(False)
            vision = []
        return [vision, language, new]

    def start_from(self, checkpoint: Path) -> None:
        """Prepares a new schedule from trained weights; the heads are new. A checkpoint of fewer
        layers gets those of NEW, which change nothing until they have learnt something.
        """
        trained = load_checkpoint(checkpoint)
        weights = trained.state_dict()
        if trained.config.layers < self.config.layers:
            weights = with_new_layers(weights, self.model)
        self.model.load_state_dict(weights)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}

    def start(self) -> None:
        """Prepares a first run: the patch embedding starts from the pictures of the first shard."""
        wait_for_shard(self.folder / "data", 0)
        pictures, _ = read_shard(self.folder / "data", 0)
        whiten_patches(self.model, np.array(pictures[:512]))
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}

    def resume(self, path: Path) -> None:
        """Continues from a snapshot."""
        snapshot = torch.load(path, weights_only=True)
        self.model.load_state_dict(snapshot["model"])
        self.all_heads.load_state_dict(snapshot["heads"])
        self.ema = snapshot["ema"]
        self.step = snapshot["step"]
        for optimiser, state in zip(self._all_optimisers(), snapshot["optimisers"], strict=True):
            optimiser.load_state_dict(state)

    def save(self) -> None:
        """A snapshot to resume from, and the averaged weights as a checkpoint folder."""
        snapshot: dict[str, Any] = {
            "config": asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.all_heads.state_dict(),
            "ema": self.ema,
            "optimisers": [o.state_dict() for o in self._all_optimisers()],
        }
        temporary = self.folder / "snapshot.tmp"
        torch.save(snapshot, temporary)
        temporary.replace(self.folder / "snapshot.pt")
        averaged = Pico(self.config)
        averaged.load_state_dict(self.ema)
        save_checkpoint(averaged, self.tokenizer_path, self.folder / "hf-latest")

    def run(self, *, save_every: int, log_every: int = 50) -> None:
        """Trains to the end of the schedule."""
        while self.step < self.schedule.total:
            mode, end = self.schedule.phase(self.step)
            n_pictures = getattr(self.schedule, f"{mode}_pictures")
            plan = BatchPlan(
                n_pictures,
                mode=mode,
                true_every=self.schedule.true_every if mode == "packed" else 0,
                word_share=self.schedule.word_share,
                object_share=self.schedule.object_share,
            )
            stream = Stream(
                self.folder / "data",
                self.tokenizer_path,
                self.config,
                plan,
                self.step,
                end - self.step,
                self.schedule.shards,
            )
            for batch in DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4):
                started = time.perf_counter()
                self.train_step(batch, mode)
                self.sums["seconds"].append(time.perf_counter() - started)
                self.step += 1
                if self.step % log_every == 0:
                    self._report(mode)
                if self.step % save_every == 0 or self.step == self.schedule.total:
                    self.save()
                    if mode != "vision":
                        self._measure()

    def train_step(self, batch: list[Batch], mode: str) -> None:
        """One update of all weights.

        Each thread takes a slice when it is free, so a core that other work slows down does not
        hold up the other.
        """
        self._set_rates()
        params = [p for o in self._all_optimisers() for g in o.param_groups for p in g["params"]]
        total: list[Tensor | None] = [None] * len(params)
        for grads in self.threads.map(
            lambda part: torch.autograd.grad(self._loss(part, mode), params, allow_unused=True),
            batch,
        ):
            for k, grad in enumerate(grads):
                if grad is not None:
                    so_far = total[k]
                    total[k] = grad if so_far is None else so_far.add_(grad)
        for p, summed in zip(params, total, strict=True):
            p.grad = None if summed is None else summed.div_(len(batch))
        torch.nn.utils.clip_grad_norm_(params, 5.0)
        for part in self.optimisers:
            for optimiser in part:
                optimiser.step()
        self._average()

    def _set_rates(self) -> None:
        rates = self.schedule.rates(self.step)
        for part, base, rate in zip(self.optimisers, self.base_rates, rates, strict=True):
            groups = [g for o in part for g in o.param_groups]
            for group, lr in zip(groups, base, strict=True):
                group["lr"] = lr * rate

    def _loss(self, batch: Batch, mode: str) -> Tensor:
        features, layers = self.model.features_and_layers(to_pixels(batch.pictures))
        rows = self.model.image_rows(features)
        table = self.model.language_model.model.embed_tokens.weight
        losses = self.heads.losses(features, batch.patches)
        losses |= self.row_heads.losses(rows, table, batch.patches)
        losses["noun attention"] = self.noun_attention.loss(self.model, rows, batch.patches)
        encoder = self.model.vision_tower.vision_model.encoder
        last = cast(VisionLayer, encoder.layers[-1])
        losses |= self.neighbours.losses(last, layers[-2], features, batch.patches)
        losses["mask"] = MASK_WEIGHT * self.mask_head.loss(layers, batch.patches)
        loss = torch.stack(list(losses.values())).sum()
        self._note(losses)
        if mode == "vision":
            return loss
        return self._answer_loss(rows, batch) + self.schedule.head_weight * loss

    def _note(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name].append(float(value.detach()))

    def _answer_loss(self, rows: Tensor, batch: Batch) -> Tensor:
        losses, weights, referents = [], [], []
        for texts in batch.texts:
            layers: list[Tensor] = []
            hidden = self.model.hidden(
                rows[texts.picture_of], texts.ids, texts.positions, texts.mask, layers
            )
            for name, heads, meant in (
                ("noun", self.nouns, texts.nouns),
                ("written", self.written, texts.written),
            ):
                learnt = heads.losses(layers, meant)
                self._note({f"{name} {key}": value for key, value in learnt.items()})
                referents.append(torch.stack(list(learnt.values())).sum())
            log_probs = F.log_softmax(self.model.logits(hidden.flatten(0, 1)[texts.where]), -1)
            losses.append(-(log_probs.gather(1, texts.targets) * texts.target_weights).sum(1))
            weights.append(texts.weights)
            right = log_probs.detach().argmax(1) == texts.targets[:, 2]
            self.sums["right"].append(float(right.float().mean()))
        loss, weight = torch.cat(losses), torch.cat(weights)
        self.sums["answer"].append(float(loss.detach().mean()))
        meaning = torch.stack(referents).sum() / len(batch.texts)
        return (loss * weight).sum() / weight.sum() + self.schedule.referent_weight * meaning

    @torch.no_grad()
    def _average(self) -> None:
        keep = 0.99
        values = dict(self.model.state_dict())
        torch._foreach_lerp_(list(self.ema.values()), list(values.values()), 1 - keep)

    def _report(self, mode: str) -> None:
        means = {name: sum(v) / len(v) for name, v in self.sums.items()}
        self.sums.clear()
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        used = sum(usage.ru_utime + usage.ru_stime for usage in usages) / 3600
        log.info(
            "%s step %d/%d  %s  CPU hours %.2f", mode, self.step, self.schedule.total, text, used
        )

    def _measure(self) -> None:
        averaged = Pico(self.config)
        averaged.load_state_dict(self.ema)
        scores = monitor(averaged.eval(), self.tokenizer)
        log.info("measured at step %d: %s", self.step, {k: round(v, 3) for k, v in scores.items()})
        path = self.folder / "curve.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "pictures", *scores])
            writer.writerow([self.step, self._pictures(), *(f"{v:.4f}" for v in scores.values())])

    def _pictures(self) -> int:
        s = self.schedule
        vision = min(self.step, s.vision_steps)
        packed = min(max(0, self.step - s.vision_steps), s.packed_steps)
        true = max(0, self.step - s.vision_steps - s.packed_steps)
        return vision * s.vision_pictures + packed * s.packed_pictures + true * s.true_pictures

    def _all_optimisers(self) -> list[torch.optim.Optimizer]:
        return [optimiser for part in self.optimisers for optimiser in part]
