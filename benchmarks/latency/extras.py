"""Optional sections of a report: other projects' times, and the answers' quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgevlm.benchmarks.latency.gather import Configuration
from edgevlm.benchmarks.latency.report import Quality, Report
from edgevlm.benchmarks.latency.runner import INTERRUPTED, BenchPlan
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import EdgeVLMError

_SCENES = 100


@dataclass(frozen=True)
class Extras:
    """Extra measurements. `peer_rounds` are turns of every peer, `checkpoint` is what the
    measured bundle was made of, `tower` what that leaves out, `pythons` are those of peers that
    have their own, `reference` is the bundle with which answers are compared.
    """

    peers: bool = False
    peer_rounds: int = 3
    checkpoint: Path | None = None
    tower: Path | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None


def with_extras(
    report: Report, plan: BenchPlan, extras: Extras, progress: Callable[[str], None]
) -> Report:
    """The report with what `extras` asks for; Ctrl-C leaves the rest out and says so."""
    try:
        if extras.reference:
            report = _with_quality(report, plan, extras.reference, progress)
        if extras.peers:
            report = _with_peers(report, plan, extras, progress)
    except KeyboardInterrupt:
        return replace(report, complete=False, notes=(*report.notes, INTERRUPTED))
    return report


def _with_peers(
    report: Report, plan: BenchPlan, extras: Extras, progress: Callable[[str], None]
) -> Report:
    from edgevlm.benchmarks.peers.run import Comparison, beside

    prompts = {result.name: result.workload.prompt for result in report.results}
    for one in _each_once(plan, prompts):
        try:
            found = beside(
                Comparison(
                    bundle=one.bundle,
                    image=one.image,
                    words=prompts[one.name],
                    checkpoint=extras.checkpoint,
                    tower=extras.tower,
                    rounds=extras.peer_rounds,
                    tokens=plan.tokens - 1,
                    threads=one.threads,
                    pythons=extras.pythons,
                ),
                one.name,
                progress,
            )
        except EdgeVLMError as error:
            notes = (*report.notes, f"{one.name}, beside other projects: {error}")
            report = replace(report, complete=False, notes=notes)
            continue
        report = replace(report, peers=(*report.peers, found))
        if not found.complete:
            return replace(report, complete=False, notes=(*report.notes, INTERRUPTED))
    return report


def _each_once(plan: BenchPlan, measured: Mapping[str, str]) -> Iterator[Configuration]:
    """The first measured configuration of each bundle and picture."""
    seen = set()
    for one in plan.configurations:
        if one.name in measured and (one.bundle.folder, one.image) not in seen:
            seen.add((one.bundle.folder, one.image))
            yield one


def _with_quality(
    report: Report, plan: BenchPlan, reference: Path, progress: Callable[[str], None]
) -> Report:
    bundles = {one.name: one.bundle for one in plan.configurations}
    other, known = open_bundle(reference), dict[Path, Quality | None]()
    results, notes = [], list[str]()
    for result in report.results:
        bundle = bundles[result.name]
        if bundle.folder not in known:
            progress(f"quality of {result.name}")
            try:
                known[bundle.folder] = _quality(bundle, other)
            except EdgeVLMError as error:
                known[bundle.folder] = None
                notes.append(f"{result.name}, quality: {error}")
        results.append(replace(result, quality=known[bundle.folder]))
    complete, notes = report.complete and not notes, [*report.notes, *notes]
    return replace(report, complete=complete, notes=tuple(notes), results=tuple(results))


def _quality(bundle: Bundle, reference: Bundle) -> Quality:
    from edgevlm.benchmarks.quality import measure

    found = measure(bundle.folder, reference.folder, _SCENES)
    return Quality(
        reference=reference.manifest.name,
        features_cosine=found.features_cosine,
        embeddings_cosine=found.embeddings_cosine,
        logit_kl=found.logit_kl,
        top1_agreement=found.top1_agreement,
        accuracy=found.accuracy,
    )
