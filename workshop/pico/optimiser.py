"""Muon for the weight matrices, AdamW for everything else: in a short training each step must
count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

    Matrices of one shape are orthogonalised together.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        threads: Executor,
        momentum: float = 0.95,
        decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})
        self.threads = threads

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        del closure
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            tasks = [same[k : k + 6] for same in shapes.values() for k in range(0, len(same), 6)]
            list(self.threads.map(lambda params, group=group: self._update(params, group), tasks))

    @torch.no_grad()
    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        shape = params[0].shape
        updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        assert p.grad is not None
        state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum"], beta)


# Three steps of the odd polynomial a x + b x^3 + c x^5, the first two steeper: as good as five
# equal ones here.
_STEPS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (2.8769, -3.1427, 1.2046))


def orthogonal(x: Tensor) -> Tensor:
    """[n, rows, columns] -> matrices with singular values near 1, by a Newton-Schulz iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for first, third, fifth in _STEPS:
        square = x @ x.transpose(1, 2)
        mixed = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
        x = torch.baddbmm(x, mixed, x, beta=first)
    return x.transpose(1, 2) if tall else x


def make_optimisers(
    named: Iterable[tuple[str, Tensor]], lr: float, muon_lr: float, threads: Executor
) -> list[torch.optim.Optimizer]:
    """Matrices of the layers to Muon; embeddings, patches, heads, norms and biases to AdamW."""
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    patches: list[Tensor] = []
    for name, p in named:
        if "patch_embedding" in name:
            patches.append(p)
        elif ".layers." in name and p.ndim == 2:
            matrices.append(p)
        else:
            (tables if p.ndim > 1 else vectors).append(p)
    groups: list[dict[str, Any]] = [
        {"params": tables, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
        # Slowly: every pixel of a patch pulls its mean colour's weights the same way.
        {"params": patches, "weight_decay": 0.0, "lr": 0.1 * lr},
    ]
    groups = [group for group in groups if group["params"]]
    optimisers: list[torch.optim.Optimizer] = []
    if matrices:
        optimisers.append(Muon(matrices, muon_lr, threads))
    if groups:
        optimisers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True))
    return optimisers


def set_gradients(
    params: Sequence[Tensor],
    parts: Sequence[Part],
    loss: Callable[[Part], Tensor],
    threads: Executor,
) -> None:
    """Gives every parameter the gradient of the sum of the parts' losses.

    Each thread takes a part when it is free, so a core that other work slows down does not hold up
    the other.
    """
    total: list[Tensor | None] = [None] * len(params)
    for grads in threads.map(
        lambda part: torch.autograd.grad(loss(part), params, allow_unused=True), parts
    ):
        for k, grad in enumerate(grads):
            if grad is not None:
                so_far = total[k]
                total[k] = grad if so_far is None else so_far.add_(grad)
    for p, summed in zip(params, total, strict=True):
        p.grad = summed
