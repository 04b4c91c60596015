"""The events of many rounds -> one Result."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from edgevlm.benchmarks.latency.cost import Cost, limits
from edgevlm.benchmarks.latency.report import (
    QUANTITIES,
    MeasuredComponent,
    MeasuredModel,
    Physics,
    Result,
    Settings,
    Workload,
)
from edgevlm.benchmarks.latency.sections import count
from edgevlm.benchmarks.latency.stats import Metric, metric
from edgevlm.benchmarks.synthetic.models import PREFIX
from edgevlm.bundle import Bundle
from edgevlm.image import read_image

# What has to hold still before measuring stops: the two halves of what a user waits for.
_WATCHED = ("first_token_warm_ms", "decode_tokens_per_s")


@dataclass(frozen=True)
class Configuration:
    """One thing to measure: a bundle, a picture file, where it runs. `name` tells it apart."""

    name: str
    bundle: Bundle
    image: Path
    device: str = "auto"
    threads: int | None = None


@dataclass
class Gathered:
    """Results of one configuration's rounds so far; `failed` says why no more come."""

    configuration: Configuration
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    facts: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
    failed: str = ""

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes in one line of a worker."""
        for name, values in event.get("samples", {}).items():
            self.samples[name] += values
        self.facts |= event.get("facts", {})
        self.unavailable |= event.get("unavailable", {})

    def metrics(self) -> dict[str, Metric]:
        """The samples summarized, in the order of QUANTITIES."""
        return {
            name: metric(quantity.unit, quantity.better, self.samples[name])
            for name, quantity in QUANTITIES.items()
            if self.samples.get(name)
        }

    def settled(self, target: float) -> bool:
        """True if the spread of what users wait for is below `target`."""
        metrics = self.metrics()
        spreads = [metrics[name].spread if name in metrics else None for name in _WATCHED]
        return all(spread is not None and spread <= target for spread in spreads)

    @property
    def measured(self) -> bool:
        """True once a pair of answers has come, which is the least that makes a result."""
        return "generated" in self.facts

    def result(self, needs: Cost, physics: Physics | None, target: float) -> Result:
        """The result so far."""
        facts, metrics, bundle = self.facts, self.metrics(), self.configuration.bundle
        found = {}
        if physics:
            n_prompt = facts["image_tokens"] + facts["text_tokens"]
            rows = (n_prompt, facts["vision_positions"], facts["image_tokens"])
            found = limits(needs, bundle, physics, metrics, rows, facts.get("vision_precision", ""))
        return Result(
            name=self.configuration.name,
            model=_model(bundle),
            workload=_workload(self.configuration.image, facts),
            settings=Settings(
                device=self.configuration.device,
                **{k: facts[k] for k in ("provider", "threads", "repack")},
                llama_cpp=tuple(facts["llama_cpp"]),
                **{k: facts.get(k, "") for k in ("energy", "decoder", "vision_precision", "kv")},
            ),
            rounds=self.rounds,
            settled=self.settled(target),
            metrics=metrics,
            unavailable=self._unavailable(metrics),
            limits=found,
        )

    def _unavailable(self, metrics: Mapping[str, Metric]) -> dict[str, str]:
        missing = [name for name in QUANTITIES if name not in metrics]
        return {name: self.unavailable.get(name, "not reached") for name in missing}


def _model(bundle: Bundle) -> MeasuredModel:
    manifest = bundle.manifest
    parts = {
        name: MeasuredComponent(
            c.precision, sum(f.bytes for f in c.files), {f.file: f.sha256 for f in c.files}
        )
        for name, c in manifest.components.items()
    }
    return MeasuredModel(
        name=manifest.name,
        synthetic=manifest.name.startswith(PREFIX),
        family=manifest.family,
        license=manifest.license,
        bytes=bundle.bytes,
        components=parts,
    )


def _workload(image: Path, facts: Mapping[str, Any]) -> Workload:
    height, width = read_image(image).shape[:2]
    names = ("prompt", "image_tokens", "text_tokens", "cached_tokens", "generated")
    return Workload(
        image=image.name,
        image_sha256=hashlib.sha256(image.read_bytes()).hexdigest(),
        image_size=(width, height),
        # An interrupted first round has not been to the long context yet.
        long_context=facts.get("long_context", 0),
        **{name: facts[name] for name in names},
    )


def configurations(
    bundles: Sequence[Bundle],
    images: Sequence[Path],
    devices: Sequence[str],
    threads: Sequence[int | None],
) -> tuple[Configuration, ...]:
    """Every combination, by names that say just what tells them apart."""
    names = _names(bundles)
    found = []
    for (name, bundle), image, device, n in product(
        zip(names, bundles, strict=True), images, devices, threads
    ):
        details = (
            image.name if len(images) > 1 else "",
            device if len(devices) > 1 else "",
            _threads(n) if len(threads) > 1 else "",
        )
        label = ", ".join(filter(None, (name, *details)))
        found.append(Configuration(label, bundle, image, device, n))
    return tuple(found)


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """The models' names; with their precisions, or else their folders, where they are the same."""
    parts = [(bundle.manifest.name, bundle.manifest.components) for bundle in bundles]
    plain = [name for name, _ in parts]
    precise = [f"{n} {p['vision'].precision} + {p['decoder'].precision}" for n, p in parts]
    placed = [f"{bundle.manifest.name} in {bundle.folder}" for bundle in bundles]
    return next((names for names in (plain, precise) if len(set(names)) == len(names)), placed)


def _threads(n: int | None) -> str:
    return "default threads" if n is None else count(n, "thread")
