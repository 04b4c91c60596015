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
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from workshop.pico.batches import Batch, BatchPlan, Stream
from workshop.pico.checkpoint import load_checkpoint, save_checkpoint
from workshop.pico.heads import (
    NOUN_LAYER,
    WRITTEN_LAYER,
    MaskHead,
    NounAttention,
    PatchHeads,
    Referents,
    RowHeads,
)
from workshop.pico.initial import (
    NEW,
    NEW_LAYER,
    grown,
    smooth_places,
    whiten_patches,
)
from workshop.pico.model import (
    DecoderLayer,
    Pico,
    PicoConfig,
    VisionLayer,
    to_pixels,
)
from workshop.pico.monitor import monitor
from workshop.pico.neighbours import (
    Neighbours,
    fill_new_channels,
    kinds_beside,
    noun_losses,
)
from workshop.pico.optimiser import make_optimisers, set_gradients
from workshop.pico.resumable import N_THREADS
from workshop.pico.schedule import Schedule
from workshop.pico.shards import read_shard, wait_for_shard
from workshop.pico.targets import patch_targets
from workshop.pico.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

MASK_WEIGHT = 5.0
FITTED_SHARDS = 6  # whose scenes show the projector what neighbours look like
KEPT_WEIGHT = 3.0  # of the share by which a new encoder layer changes the image rows


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
        self.ema = self._weights()
        self.step = 0
        self.sums: dict[str, list[float]] = defaultdict(list)

    def _parts(self) -> list[list[tuple[str, nn.Parameter]]]:
        """The weights of the encoder, of the decoder, and those that are new to the decoder.

        Where there are new ones, what comes before them stays as it is.
        """
        continued = self.schedule.inherited is not None
        after = tuple(
            f"language_model.model.{part}."
            for part in ("norm", *(f"layers.{k}" for k in range(NEW_LAYER, self.config.layers)))
        )
        vision: list[tuple[str, nn.Parameter]] = []
        language: list[tuple[str, nn.Parameter]] = []
        new: list[tuple[str, nn.Parameter]] = []
        for name, p in self.model.named_parameters():
            if continued and not name.startswith(NEW + after):
                p.requires_grad_(False)
            elif name.startswith("vision_tower."):
                vision.append((name, p))
            else:
                (new if continued and name.startswith(NEW) else language).append((name, p))
        return [vision, language, new]

    def start_from(self, checkpoint: Path) -> None:
        """Prepares a new schedule from trained weights; the heads are new. A checkpoint of fewer
        layers gets those of NEW and more channels, which change nothing until they have learnt.
        """
        trained = load_checkpoint(checkpoint)
        weights = trained.state_dict()
        if trained.config.layers < self.config.layers:
            weights = grown(weights, self.model)
        self.model.load_state_dict(weights)
        self.ema = self._weights()

    def start(self) -> None:
        """Prepares a first run: the patch embedding starts from the pictures of the first shard."""
        wait_for_shard(self.folder / "data", 0)
        pictures, _ = read_shard(self.folder / "data", 0)
        whiten_patches(self.model, np.array(pictures[:512]))
        self.ema = self._weights()

    def _fill_new_channels(self) -> None:
        """Has the projector, which then stays as it is, put into the new channels what the encoder
        knows of the neighbours.
        """
        known = map(self._known, range(min(FITTED_SHARDS, self.schedule.shards)))
        features, kinds = (torch.cat(parts) for parts in zip(*known, strict=True))
        missing = fill_new_channels(self.model.multi_modal_projector.linear, features, kinds)
        log.info("the new channels hold the neighbours' kinds but for %.3f nats", missing)
        self.ema = self._weights()

    def _known(self, shard: int) -> tuple[Tensor, Tensor]:
        """The features of a shard's patches that show something, and the kinds beside it."""
        wait_for_shard(self.folder / "data", shard)
        pictures, facts = read_shard(self.folder / "data", shard)
        patches = patch_targets(facts, self.config.grid)
        targets = {name: torch.from_numpy(value) for name, value in patches.items()}
        pieces = torch.split(torch.from_numpy(np.array(pictures)), 64)
        seen = targets["thing"] >= 0
        features = torch.cat(list(self.threads.map(self._features, pieces)))
        return features[seen], kinds_beside(targets)[seen]

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return self.model.features(to_pixels(pictures))

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

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
            if mode != "vision" and not self.model.multi_modal_projector.linear.weight[-1].any():
                self._fill_new_channels()
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
        """One update of all weights."""
        self._set_rates()
        params = [p for o in self._all_optimisers() for g in o.param_groups for p in g["params"]]
        n = len(batch)
        set_gradients(params, batch, lambda part: self._loss(part, mode) / n, self.threads)
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
        still = mode != "vision" and self.schedule.vision_share == 0
        with torch.set_grad_enabled(not still):
            features, layers = self.model.features_and_layers(to_pixels(batch.pictures))
        rows = self.model.image_rows(features)
        losses: dict[str, Tensor] = {}
        if mode == "vision" and self.schedule.inherited is not None:
            losses = self._neighbour_losses(features, layers, batch)
            losses["rows kept"] = KEPT_WEIGHT * self._changed(rows, layers)
        elif not still:
            losses = self.heads.losses(features, batch.patches) | self._row_losses(rows, batch)
            losses |= self._neighbour_losses(features, layers, batch)
            losses["mask"] = MASK_WEIGHT * self.mask_head.loss(layers, batch.patches)
        self._note(losses)
        loss = torch.stack([torch.zeros(()), *losses.values()]).sum()
        if mode == "vision":
            return loss
        return self._answer_loss(rows, batch) + self.schedule.head_weight * loss

    def _row_losses(self, rows: Tensor, batch: Batch) -> dict[str, Tensor]:
        table = self.model.language_model.model.embed_tokens.weight
        losses = self.row_heads.losses(rows, table, batch.patches)
        losses["noun attention"] = self.noun_attention.loss(self.model, rows, batch.patches)
        return losses

    def _neighbour_losses(
        self, features: Tensor, layers: list[Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        last = cast(VisionLayer, self.model.vision_tower.vision_model.encoder.layers[-1])
        return self.neighbours.losses(last, layers[-2], features, batch.patches)

    def _changed(self, rows: Tensor, layers: list[Tensor]) -> Tensor:
        """Share of their variance by which the last layer changes the image rows: what it adds
        should stand where the projector does not look yet, or all that the decoder knows of rows
        has to be learnt again.
        """
        with torch.no_grad():
            tower = self.model.vision_tower.vision_model
            before = self.model.image_rows(tower.post_layernorm(layers[-2]))
        return (rows - before).square().mean() / before.var()

    def _note(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name].append(float(value.detach()))

    def _answer_loss(self, rows: Tensor, batch: Batch) -> Tensor:
        losses, weights, referents = [], [], []
        layer = cast(DecoderLayer, self.model.language_model.model.layers[NEW_LAYER])
        for texts in batch.texts:
            layers: list[Tensor] = []
            hidden = self.model.hidden(
                rows[texts.picture_of], texts.ids, texts.positions, texts.mask, layers
            )
            n_text = texts.ids.shape[1]
            learnt = noun_losses(layer, layers, texts, batch.patches)
            for name, heads, meant in (
                ("noun", self.nouns, texts.nouns),
                ("written", self.written, texts.written),
            ):
                known = heads.losses(layers, meant, n_text)
                learnt |= {f"{name} {key}": value for key, value in known.items()}
            self._note(learnt)
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
        with path.open("a", newline="", encoding="utf-8") as file:
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
