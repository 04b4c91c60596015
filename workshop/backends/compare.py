"""One part of a model on another back end beside the CPU: the same numbers, and how fast.

Both are loaded at once and take turns, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import edgevlm
from edgevlm.errors import EngineMissing
from edgevlm.export.parity.metrics import distance
from edgevlm.image import cut, read_picture
from edgevlm.prompt import Exchange
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.stages import stages
from edgevlm.runtimes.vision import providers
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.runtimes.vision.providers import Offer
from edgevlm.sampling import Sampling

_ROUNDS = 3
_TOKENS = 16
_PROMPT = "What is in the picture?"

VISION_HEAD = (
    "model", "runs", "features", "embeddings", "first start", "second start", "encode", "CPU"
)  # fmt: skip
CHOICE_HEAD = ("device", "provider", "version", "here", "chosen by")
DECODER_HEAD = (
    "model", "runs", "logits", "divergence", "same tokens", "prefill", "CPU", "a token", "CPU"
)  # fmt: skip


def vision(folder: Path, word: str, picture: Path) -> tuple[str, ...]:
    """The row of a bundle's encoder: worst cosines of a row, starts and medians of a picture."""
    starts = []
    for _ in range(2):
        with edgevlm.load(folder, vision_device=word, decoder_device="cpu") as vlm:
            starts.append(vlm.load_ms)
    with (
        edgevlm.load(folder, vision_device=word, decoder_device="cpu") as other,
        edgevlm.load(folder, device="cpu") as cpu,
    ):
        pixels = cut(read_picture(picture), cpu.manifest.image)
        features = [m.engines.encoder.features(pixels) for m in (other, cpu)]
        embeddings = [m.engines.encoder.project(features[1]) for m in (other, cpu)]
        times = _in_turn(
            lambda: other.engines.encoder.features(pixels),
            lambda: cpu.engines.encoder.features(pixels),
        )
        return (
            f"{cpu.manifest.name}, {cpu.devices.vision.precision}",
            str(other.devices.vision).partition(", cosine")[0],
            f"{1 - distance(*features):.6f}",
            f"{1 - distance(*embeddings):.6f}",
            *(f"{s:.0f} ms" for s in starts),
            *(f"{t:.1f} ms" for t in times),
        )


def decoder(folder: Path, word: str, picture: Path) -> tuple[str, ...]:
    """The row of a bundle's decoder on the CPU's rows and tokens.

    Its largest difference of a logit in standard deviations, the mean divergence of the next
    token's distribution in nats, how often the likeliest token is the same, and medians.
    """
    with (
        edgevlm.load(folder, vision_device="cpu", decoder_device=word) as other,
        edgevlm.load(folder, device="cpu") as cpu,
    ):
        greedy = stages(cpu.engines, _PROMPT, picture, _TOKENS)
        right, tokens = greedy.logits, greedy.tokens.tolist()
        found = stages(other.engines, _PROMPT, picture, _TOKENS, follow=tokens).logits
        apart = np.abs(found - right).max() / right.std()
        divergence = _divergence(right, found)
        same = (found.argmax(1) == right.argmax(1)).mean()
        prefills = _in_turn(*(_prefill(m, picture) for m in (other, cpu)))
        steps = _in_turn(*(_step(m, tokens[0]) for m in (other, cpu)))
        return (
            f"{cpu.manifest.name}, {cpu.manifest.components['decoder'].precision}",
            str(other.devices.decoder),
            f"{apart:.2g}",
            f"{divergence:.2g}",
            f"{same:.0%}",
            *(f"{t:.1f} ms" for t in (*prefills, *steps)),
        )


def choices() -> list[tuple[str, ...]]:
    """The rows of the plugin libraries that are installed: the devices they offer, those that they
    make up for compilation included, and the words that choose each.
    """
    ort = Ort()
    real = ort.offers()
    offers = ort.offers(virtual=True)
    words = ("auto", "cpu", "gpu", "npu", *providers.WORDS, *dict.fromkeys(o.word for o in offers))
    rows = []
    for offer in offers:
        chosen_by = [w for w in dict.fromkeys(words) if offer in _allowed(w, offers)]
        here = "yes" if any(o.word == offer.word for o in real) else "no"
        rows.append((offer.word, offer.provider.name, offer.version, here, ", ".join(chosen_by)))
    return list(dict.fromkeys(rows))  # Several generations of one device look the same here.


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _allowed(word: str, offers: Sequence[Offer]) -> list[Offer]:
    try:
        return providers.candidates(word, offers)
    except EngineMissing:
        return []


def _prefill(vlm: VLM, picture: Path) -> Callable[[], object]:
    model = vlm.engines
    options = Sampling(max_tokens=_TOKENS)
    request = prepare(model, [Exchange(_PROMPT, 1)], [picture], options)
    blocks = input_blocks(model, request)

    def run() -> None:
        model.decoder.clear()
        prefill(model, request, blocks, _TOKENS)
        model.decoder.logits()

    return run


def _step(vlm: VLM, token: int) -> Callable[[], object]:
    decoder = vlm.engines.decoder

    def run() -> None:
        decoder.step(token)
        decoder.logits()

    return run


def _divergence(right: Float, found: Float) -> float:
    p, q = _log_softmax(right), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: Float) -> npt.NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    z -= np.log(np.exp(z).sum(1, keepdims=True))
    return z


def _in_turn(*calls: Callable[[], object]) -> list[float]:
    """The median of each call in milliseconds, one round to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            kept.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(kept[1:]) for kept in times]
