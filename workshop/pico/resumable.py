"""Base of trainings that can be stopped and resumed."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workshop.pico.optimiser import set_gradients

log = logging.getLogger(__name__)

N_THREADS = 2


def falling(step: int, steps: int, warm: int) -> float:
    """The share of a learning rate that rises for ``warm`` steps and falls to zero in a straight
    line.
    """
    return min(1.0, (step + 1) / warm) * (1 - step / steps)


class Resumable:
    """Steps that can be resumed, averaged weights, means of the losses.

    ``trained`` is what the snapshot holds, by name; what learns is what the optimisers have.
    """

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
        """Masks gradients, where not all of a parameter may change."""

    def note(self, losses: dict[str, Tensor]) -> None:
        """Remembers losses for the next report."""
        for name, value in losses.items():
            self.sums[name].append(float(value.detach()))

    def report(self, steps: int) -> None:
        """Logs the means since the last report."""
        means = "  ".join(f"{name} {np.mean(v):.3f}" for name, v in self.sums.items())
        log.info("step %d/%d  %s", self.step, steps, means)
        self.sums.clear()
