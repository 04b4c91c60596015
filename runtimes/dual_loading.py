"""A dual encoder's bundle -> a DualEncoder: files checked, each side opened when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.bundle import Bundle, check_path, open_bundle
from edgevlm.errors import PromptError
from edgevlm.runtimes import checks, devices, rules
from edgevlm.runtimes.dual import DualEncoder, RowEncoder, Sides
from edgevlm.runtimes.vision import providers
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.runtimes.vision.providers import CPU, Offer
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
        return encoder, TextTokens(tokenizer, manifest.text)
