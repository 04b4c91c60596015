"""Chooses the vision encoder's provider: each is tried in turn, every refusal has a reason.

Knows the table of providers and `Ort`, not onnxruntime. A provider is taken when it opens the
graphs, runs nodes of them, and computes what the bundle says that float32 computes, or for older
bundles what the CPU does; by `auto` when it is faster, too. The CPU is judged alike: one precision
may be wrong on a processor and another right.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgevlm import cleanup, machine
from edgevlm.bundle import Bundle
from edgevlm.errors import EngineError
from edgevlm.image.plan import measured_side
from edgevlm.manifest import Component
from edgevlm.models import cache_directory
from edgevlm.runtimes import checks
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.vision import first_use
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.first_use import TOLERANCE, Verdict, Verdicts
from edgevlm.runtimes.vision.ort import Counts, Ort, Unfit, counts
from edgevlm.runtimes.vision.providers import CPU, Offer, candidates, pick
from edgevlm.specs import SelfCheck
from edgevlm.types import Placement, Progress

_FALLBACK = Offer(CPU, "")
_STAGE = "self-check"


Done = TypeVar("Done")


@dataclass(frozen=True)
class Wish:
    """The device and settings wanted for the encoder.

    word: the device asked for. cpu_precisions: of the vision encoder, best first on the CPU.
    spin: whether onnxruntime's workers wait busily. prepack: whether the CPU packs 8-bit weights
    once, at the start, and not for every picture; the bits are the same.
    """

    word: str
    threads: int
    spin: bool = False
    cpu_precisions: tuple[str, ...] = ()
    prepack: bool = True


def open_encoder(
    bundle: Bundle,
    wish: Wish,
    ort: Ort | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[OrtEncoder, Placement]:
    """The bundle's encoder on the first provider that is fit for it.

    `progress` is told of a first use, which takes one picture's time or a few. Raises EngineMissing
    where nothing of that name is installed, EngineError where what was named cannot run the encoder
    or computes wrongly, BundleCorrupt for bad graphs.
    """
    opener = _Opener(bundle, wish, ort or Ort(), progress or (lambda _: None))
    notes: list[str] = []
    for offer in candidates(wish.word, opener.ort.offers()) or [_FALLBACK]:
        try:
            return opener.open(offer, tuple(notes))
        except Unfit as e:
            notes.append(f"{offer.word}: {e}")
    raise EngineError(
        f"device {wish.word!r} cannot run the vision encoder: {'; '.join(notes)}; "
        "choose another --vision-device, or auto"
    )


class _Opener:
    def __init__(
        self, bundle: Bundle, wish: Wish, ort: Ort, progress: Callable[[Progress], None]
    ) -> None:
        self.ort, self._progress = ort, progress
        self._bundle, self._wish = bundle, wish
        self._projects = "projector" in bundle.manifest.components
        self._cache = cache_directory() / "devices"
        self._verdicts = Verdicts(self._cache / "first-use")

    def open(self, offer: Offer, notes: tuple[str, ...]) -> tuple[OrtEncoder, Placement]:
        """The encoder on one provider; raises Unfit where it should not run there."""
        there = self._bundle.vision_precisions
        if offer.provider is CPU:
            return self._on_the_cpu(notes)
        precision = pick(offer.provider.precisions, there)
        key = self._key(offer, precision, offer.hardware)
        verdict = self._verdicts.recall(key)
        if verdict is not None:
            self._judge(verdict)
        encoder, placed = self._encoder(offer, precision, self._compiled(key))
        if placed.placed == 0:
            raise Unfit(f"it runs none of the graphs' {placed.total} nodes")
        if verdict is None:
            verdict = self._first_use(offer, precision, encoder)
            self._verdicts.remember(key, verdict)
            self._judge(verdict)
        return encoder, self._placed(offer, precision, placed, verdict.cosine, notes)

    def _on_the_cpu(self, notes: tuple[str, ...]) -> tuple[OrtEncoder, Placement]:
        """The encoder at the first precision that this processor computes rightly.

        Raises EngineError where there is none.
        """
        there, hardware = self._bundle.vision_precisions, machine.processor()
        offer, wrong = replace(_FALLBACK, version=self.ort.version), list[str]()
        for precision in dict.fromkeys((pick(self._wish.cpu_precisions, there), *there)):
            key = self._key(offer, precision, hardware)
            verdict = self._verdicts.recall(key) if self._right else None
            try:
                if verdict is not None:
                    self._judge(verdict)
                encoder, _ = self._encoder(offer, precision, Path())
                if self._right and verdict is None:
                    verdict = self._cpu_verdict(self._right, offer, precision, encoder, hardware)
                    self._verdicts.remember(key, verdict)
                    self._judge(verdict)
                said = (*notes, *wrong)
                return encoder, self._placed(offer, precision, notes=said)
            except Unfit as e:
                wrong.append(f"cpu at {precision}: {e}")
        raise EngineError(
            f"the vision encoder computes wrongly on this processor: {'; '.join(wrong)}; export "
            "the bundle with another precision (--vision-precision fp32), or install another "
            "release of onnxruntime"
        )

    def _cpu_verdict(
        self, right: SelfCheck, offer: Offer, precision: str, encoder: OrtEncoder, hardware: str
    ) -> Verdict:
        try:
            mine = self._told(lambda: self._numbers(encoder), encoder.cancel)
        except BaseException:
            encoder.close()
            raise
        nearness = first_use.nearness(mine, right)
        if nearness < self._least(precision):
            encoder.close()
        return Verdict(
            nearness,
            self._least(precision),
            0.0,
            0.0,
            self._files(precision),
            offer.word,
            offer.version,
            hardware,
        )

    @property
    def _right(self) -> SelfCheck | None:
        """The numbers that the bundle says are right; older bundles have none."""
        return self._bundle.manifest.self_check

    def _least(self, precision: str) -> float:
        """The least cosine for an encoder of a precision."""
        allowed = self._right.tolerances.get(precision, TOLERANCE) if self._right else TOLERANCE
        return 1 - allowed

    def _numbers(self, encoder: OrtEncoder) -> SelfCheck:
        image = self._bundle.manifest.image
        return first_use.numbers(encoder, image, projects=self._projects)

    def _told(self, work: Callable[[], Done], stop: Callable[[], None]) -> Done:
        """Runs a first use, which Ctrl-C ends by `stop`, and says that it runs."""
        self._progress(Progress(_STAGE, 0, 1, "pictures"))
        try:
            return interruptible(work, stop)
        finally:
            self._progress(Progress(_STAGE, 1, 1, "pictures"))

    def _key(self, offer: Offer, precision: str, hardware: str) -> str:
        right, of = self._right, self._files(precision)
        what = (*of, offer.provider.name, offer.word, offer.version, hardware)
        return first_use.key(*what, *([repr(right)] if right else []))

    def _compiled(self, key: str) -> Path:
        """A folder for what the provider compiles; this process's own where none can be kept."""
        folder = self._cache / "compiled" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        except OSError:
            return _temporary() / key

    def _encoder(self, offer: Offer, precision: str, folder: Path) -> tuple[OrtEncoder, Counts]:
        """The sessions, and how many nodes of all run on the provider."""
        wish, name = self._wish, offer.provider.name
        on_cpu = offer.provider is CPU
        # A float32 graph rounds otherwise without.
        prepack = wish.prepack or precision != "int8" or not on_cpu
        graphs = {"pixels": (self._bundle.vision(precision), prepack)}
        if self._projects:
            graphs["features"] = self._bundle.path("projector"), True
        for graph, _ in graphs.values():
            checks.graph(graph, self._bundle.names)

        def sessions() -> dict[str, Any]:
            return {
                given: self.ort.session(
                    graph, offer, wish.threads, wish.spin, folder, prepack=packed
                )
                for given, (graph, packed) in graphs.items()
            }

        opened = sessions()
        encoder = OrtEncoder(self.ort, opened, provider=name, single=not on_cpu, again=sessions)
        if on_cpu:
            return encoder, Counts(0, 0)
        placed = [counts(session, offer.provider) for session in opened.values()]
        return encoder, sum(placed, Counts(0, 0))

    def _first_use(self, offer: Offer, precision: str, encoder: OrtEncoder) -> Verdict:
        size = measured_side(self._bundle.manifest.image)
        best = pick(self._wish.cpu_precisions, self._bundle.vision_precisions)
        same, _ = self._encoder(_FALLBACK, precision, Path())
        fastest = same if best == precision else self._encoder(_FALLBACK, best, Path())[0]

        def measure() -> Verdict:
            right = self._right or self._numbers(same)
            return Verdict(
                first_use.nearness(self._numbers(encoder), right),
                self._least(precision),
                first_use.encode_ms(encoder, size),
                first_use.encode_ms(fastest, size),
                self._files(precision),
                offer.word,
                offer.version,
                offer.hardware,
            )

        def stop() -> None:
            for running in (encoder, same, fastest):
                running.cancel()

        try:
            return self._told(measure, stop)
        except EngineError as e:
            raise Unfit(str(e)) from None
        finally:
            for cpu in {same, fastest}:
                cpu.close()

    def _judge(self, verdict: Verdict) -> None:
        if not verdict.sound:
            raise Unfit(
                f"its features differ from the {'bundle' if self._right else 'CPU'}'s (cosine "
                f"{verdict.cosine:.4f}, at least {verdict.least:.4g})"
            )
        if self._wish.word == "auto" and verdict.encode_ms > verdict.cpu_ms:
            raise Unfit(
                f"it encodes a picture in {verdict.encode_ms:.3g} ms, "
                f"the CPU in {verdict.cpu_ms:.3g} ms"
            )

    def _files(self, precision: str) -> tuple[str, ...]:
        """The hashes of everything that the encoder is made of."""
        manifest = self._bundle.manifest
        vision = manifest.alternatives.get(precision, manifest.components["vision"])
        projector = _hashes(manifest.components["projector"]) if self._projects else ()
        return _hashes(vision) + projector

    def _placed(
        self,
        offer: Offer,
        precision: str,
        placed: Counts | None = None,
        cosine: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> Placement:
        return Placement(
            asked=self._wish.word,
            device=offer.word,
            engine=offer.provider.name,
            hardware=offer.hardware,
            placed=placed.placed if placed else 0,
            total=placed.total if placed else 0,
            unit="nodes",
            precision=precision,
            cosine=cosine,
            notes=notes,
        )


@functools.cache
def _temporary() -> Path:
    """A folder for the life of this process."""
    folder = ExitStack()
    atexit.register(folder.close)
    return folder.enter_context(cleanup.temporary_folder())


def _hashes(component: Component) -> tuple[str, ...]:
    return tuple(record.sha256 for record in component.files)
