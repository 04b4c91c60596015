"""Bundles of every family, and what an arm64 processor made of them beside what this one did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from edgevlm.bundle import open_bundle
from edgevlm.errors import EdgeVLMError
from edgevlm.export import child, export_bundle, precisions
from edgevlm.export.parity import compare
from edgevlm.export.targets import TARGETS
from tests import inside
from tests.test_families import CHECKPOINTS
from workshop.arm64.answers import EXACT

# Unquantized, and as the target "phone" has it.
PRECISIONS = {"f32": "fp32", TARGETS["phone"].quant: TARGETS["phone"].vision[0]}
# Of pico's answers that may come out otherwise: one in a hundred.
_POINT = 0.01


class Difference(NamedTuple):
    """One stage of one bundle: how far it is off, there and here, in shares of its bound."""

    bundle: str
    stage: str
    share: float
    here: float

    @property
    def ok(self) -> bool:
        """True if it is within the bound."""
        return self.share <= 1.0


@dataclass(frozen=True)
class Compared:
    """One processor beside this machine.

    machine: what it said of itself. pico: right answers and all, there and here. differences: the
    worst stage of each bundle. same: how many unquantized bundles answered the same tokens.
    """

    machine: Mapping[str, Any]
    pico: tuple[int, int, int]
    differences: tuple[Difference, ...]
    same: int

    def worst(self, precision: str) -> Difference:
        """The bundle of a precision that is nearest to its bound."""
        return max(
            (d for d in self.differences if d.bundle.endswith(f"-{precision}")),
            key=lambda d: d.share,
        )

    def check(self) -> None:
        """Raises EdgeVLMError where anything is off by more than it may be."""
        n_exact = sum(d.bundle.endswith(EXACT) for d in self.differences)
        if self.same != n_exact:
            raise EdgeVLMError(f"{n_exact - self.same} of {n_exact} answered other tokens")
        for d in self.differences:
            if not d.ok:
                raise EdgeVLMError(
                    f"{d.bundle}: {d.stage} is {d.share:.2f} of its bound, here {d.here:.2f}"
                )
        there, here, of = self.pico
        if abs(there - here) > _POINT * of:
            raise EdgeVLMError(f"pico: {there} right answers of {of}, here {here}")


def write_bundles(folder: Path) -> Iterator[str]:
    """Exports every family's tiny checkpoint at each precision; yields the bundles' names."""
    for name, (_, write) in CHECKPOINTS.items():
        checkpoint = write(folder.parent / "checkpoints" / name)
        for quant, vision in PRECISIONS.items():
            out = folder / f"{name}-{quant}"
            with mock.patch.object(child, "run", inside.child):
                export_bundle(checkpoint, out, quant=quant, vision_precision=vision, verify=False)
            yield out.name


def beside(bundles: Path, here: Path, there: Path) -> Compared:
    """Compares two folders of `workshop.arm64.answers`, this machine's and another's."""
    differences, same = list[Difference](), 0
    for bundle in sorted(bundles.iterdir()):
        name, _, quant = bundle.name.rpartition("-")
        exact = dict(np.load(here / f"{name}{EXACT}.npz"))
        ours, mine = (dict(np.load(f / f"{bundle.name}.npz")) for f in (there, here))
        if quant == EXACT[1:]:
            same += ours["tokens"].tolist() == exact["tokens"].tolist()
        parts = open_bundle(bundle).manifest.components
        (vision,) = precisions.vision_precisions(parts["vision"].precision)
        judged = partial(compare.answered, precisions.quant(quant), vision)
        stages = zip(judged(ours, exact), judged(mine, exact), strict=True)
        shares = [(a.worst / a.tolerance, b.worst / b.tolerance, a.stage) for a, b in stages]
        share, own, stage = max(shares)
        differences.append(Difference(bundle.name, stage, share, own))
    machines = [json.loads((f / "machine.json").read_text(encoding="utf-8")) for f in (here, there)]
    right = [sum(r for r, _ in m["pico"].values()) for m in machines]
    of = sum(of for _, of in machines[0]["pico"].values())
    return Compared(machines[1], (right[1], right[0], of), tuple(differences), same)
