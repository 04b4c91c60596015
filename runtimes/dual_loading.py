"""A dual encoder's bundle -> a DualEncoder: files checked, each side opened when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm import machine
from edgevlm.bundle import Bundle, check_path, open_bundle
from edgevlm.errors import EngineError, PromptError
from edgevlm.models import cache_directory
from edgevlm.runtimes import checks, devices, rules
from edgevlm.runtimes.dual import DualEncoder, RowEncoder, Sides
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.vision import first_use, providers
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.first_use import TOLERANCE, Verdict, Verdicts
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.runtimes.vision.providers import CPU, Offer
from edgevlm.self_check import TEXT, cosine, row_sketch
from edgevlm.texts import Ids, TextTokens
from edgevlm.types import Placement


def open_dual(folder: Path, device: str, threads: int | None) -> DualEncoder:
    """Opens and checks a dual encoder's bundle; no graph is loaded yet.

    Raises BundleError, PromptError for another model's, EngineMissing for a device that is not
    installed. A device that cannot run the vision tower is told with its first use (EngineError).
    """
    check_path(folder)
    bundle = open_bundle(folder)
    if not bundle.manifest.text:
        raise PromptError(
            f"{bundle.manifest.name}: answers questions and embeds no texts; edgevlm.load loads it"
        )
    ort = Ort()
    word, _ = devices.split(
        device,
        None,
        None,
        vision_words={*providers.WORDS, *(o.provider.word for o in ort.offers())},
        decoder_words=(),
    )
    settings = rules.settings(rules.this_machine(""))
    wish = Wish(word, threads or settings.vision_threads, cpu_precisions=settings.vision)
    opening = _Opening(bundle, ort, wish)
    return DualEncoder(bundle.manifest, Sides(opening.vision, opening.text))


@dataclass(frozen=True)
class _Opening:
    bundle: Bundle
    ort: Ort
    wish: Wish

    def vision(self) -> tuple[RowEncoder, Placement]:
        return open_encoder(self.bundle, self.wish, self.ort)

    def text(self) -> tuple[RowEncoder, Callable[[Sequence[str]], Ids]]:
        """On the processor: a query is one short run."""
        manifest = self.bundle.manifest
        assert manifest.text
        graph, offer = self.bundle.path("text"), Offer(CPU, self.ort.version)
        checks.graph(graph, self.bundle.names)

        def sessions() -> dict[str, object]:
            return {"ids": self.ort.session(graph, offer, self.wish.threads, False, graph.parent)}

        encoder = OrtEncoder(self.ort, sessions(), provider=CPU.name, single=False, again=sessions)
        tokenizer = self.bundle.folder / manifest.components["text"].files[-1].file
        tokens = TextTokens(tokenizer, manifest.text)
        self._check(encoder, tokens)
        return encoder, tokens

    def _check(self, encoder: OrtEncoder, tokens: TextTokens) -> None:
        """Compares the text tower with the bundle's numbers at its first use on this machine.

        Raises EngineError where it computes something else.
        """
        right, files = (
            self.bundle.manifest.self_check,
            self.bundle.manifest.components["text"].files,
        )
        if right is None or not right.text:
            return
        hashes, hardware = tuple(r.sha256 for r in files), machine.processor()
        key = first_use.key(*hashes, CPU.name, self.ort.version, hardware, repr(right.text))
        verdicts = Verdicts(cache_directory() / "devices" / "first-use")
        verdict = verdicts.recall(key)
        if verdict is None:
            ids = tokens([TEXT])
            mine = row_sketch(interruptible(lambda: encoder.embed(ids), encoder.cancel))
            least = 1 - right.tolerances.get("text", TOLERANCE)
            found = cosine(mine.ravel(), right.text)
            facts = (hashes, CPU.word, self.ort.version, hardware)
            verdict = Verdict(found, least, 0.0, 0.0, *facts)
            verdicts.remember(key, verdict)
        if not verdict.sound:
            encoder.close()
            raise EngineError(
                "the text tower computes wrongly on this processor: its row differs from the "
                f"bundle's (cosine {verdict.cosine:.4f}, at least {verdict.least:.4g}); export the "
                "bundle with another precision (--vision-precision fp32), or install another "
                "release of onnxruntime"
            )
