"""Chooses the vision encoder's provider: each is tried in turn, every refusal has a reason.

Knows the table of providers and `Ort`, not onnxruntime. A provider is taken when it opens the
graphs, runs nodes of them, and computes what the CPU computes; by `auto` when it is faster, too.
"""

from __future__ import annotations

import atexit
import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm import cleanup
from edgevlm.bundle import Bundle, Component
from edgevlm.errors import EngineError
from edgevlm.models import cache_directory
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.vision import first_use
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.first_use import BOUND, Verdict, Verdicts
from edgevlm.runtimes.vision.ort import Counts, Ort, Unfit, counts
from edgevlm.runtimes.vision.providers import CPU, Offer, candidates, pick
from edgevlm.types import Placement

_FALLBACK = Offer(CPU, "")


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
    bundle: Bundle, wish: Wish, ort: Ort | None = None
) -> tuple[OrtEncoder, Placement]:
    """The bundle's encoder on the first provider that is fit for it.

    Raises EngineMissing where nothing of that name is installed, EngineError where what was named
    cannot run the encoder or computes something else than the CPU, BundleCorrupt for bad graphs.
    """
    opener = _Opener(bundle, wish, ort or Ort())
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
    def __init__(self, bundle: Bundle, wish: Wish, ort: Ort) -> None:
        self.ort = ort
        self._bundle, self._wish = bundle, wish
        self._cache = cache_directory() / "devices"
        self._verdicts = Verdicts(self._cache / "first-use")

    def open(self, offer: Offer, notes: tuple[str, ...]) -> tuple[OrtEncoder, Placement]:
        """The encoder on one provider; raises Unfit where it should not run there."""
        there = self._bundle.vision_precisions
        if offer.provider is CPU:
            precision = pick(self._wish.cpu_precisions, there)
            encoder, _ = self._encoder(offer, precision, Path())
            return encoder, self._placed(offer, precision, notes=notes)
        precision = pick(offer.provider.precisions, there)
        files = self._files(precision)
        key = first_use.key(*files, offer.provider.name, offer.word, offer.version, offer.hardware)
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

    def _compiled(self, key: str) -> Path:
        """A folder for what the provider compiles; this process's own where none can be kept."""
        folder = self._cache / "compiled" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        except OSError:
            return _temporary() / key

    def _encoder(self, offer: Offer, precision: str, folder: Path) -> tuple[OrtEncoder, Counts]:
        """The two sessions, and how many nodes of both run on the provider."""
        wish, name = self._wish, offer.provider.name
        on_cpu = offer.provider is CPU
        # A float32 graph rounds otherwise without.
        prepack = wish.prepack or precision != "int8" or not on_cpu
        graphs = (self._bundle.vision(precision), prepack), (self._bundle.path("projector"), True)

        def sessions() -> tuple[Any, Any]:
            vision, projector = (
                self.ort.session(graph, offer, wish.threads, wish.spin, folder, prepack=packed)
                for graph, packed in graphs
            )
            return vision, projector

        vision, projector = sessions()
        encoder = OrtEncoder(
            self.ort, vision, projector, provider=name, single=not on_cpu, again=sessions
        )
        if on_cpu:
            return encoder, Counts(0, 0)
        return encoder, counts(vision, offer.provider) + counts(projector, offer.provider)

    def _first_use(self, offer: Offer, precision: str, encoder: OrtEncoder) -> Verdict:
        size = self._bundle.manifest.image.size
        best = pick(self._wish.cpu_precisions, self._bundle.vision_precisions)
        same, _ = self._encoder(_FALLBACK, precision, Path())
        fastest = same if best == precision else self._encoder(_FALLBACK, best, Path())[0]

        def measure() -> Verdict:
            return Verdict(
                first_use.compare(encoder, same, size),
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
            return interruptible(measure, stop)
        except EngineError as e:
            raise Unfit(str(e)) from None
        finally:
            for cpu in {same, fastest}:
                cpu.close()

    def _judge(self, verdict: Verdict) -> None:
        if not verdict.sound:
            raise Unfit(
                f"its features differ from the CPU's (cosine {verdict.cosine:.4f}, at least "
                f"{BOUND})"
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
        return _hashes(vision) + _hashes(manifest.components["projector"])

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
