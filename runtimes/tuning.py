"""Measures on this machine what the rules can only guess: `edgevlm tune`.

Choices are compared one setting after the other, each on the part of an answer that it concerns, in
turn. The fastest run of each counts, since other programs only ever add to a time; the choice that
held before stays unless another is WORTH more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from edgevlm.bundle import Bundle, check_path, open_bundle
from edgevlm.errors import PromptError
from edgevlm.image.overlap import for_projector
from edgevlm.image.plan import measured_side, plan
from edgevlm.machine import physical_cores, usable_cpus
from edgevlm.runtimes import tuned
from edgevlm.runtimes.budget import PHOTO
from edgevlm.runtimes.engines import Block, BlockAttention, Float, sequential
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.loading import LoadOptions, choose, single
from edgevlm.runtimes.rules import GOALS, EngineSettings, Goal
from edgevlm.runtimes.tuned import Compared, Tuning
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.providers import pick
from edgevlm.self_check import picture
from edgevlm.specs import ImageSpec
from edgevlm.types import FlashAttention, Progress, Repacking

W = TypeVar("W", bound=str)

# A choice has to win by so much; else the one stays that was measured on more machines.
WORTH = 0.05
# A choice so much slower than the best in its first run is not run again.
_HOPELESS = 1.3
# Runs of a choice after one that warms up.
_ROUNDS = 3
# Rows of a prefill and tokens of an answer that are timed.
_ROWS, _TOKENS = 128, 16
_BATCHES = (512, 128)
# By what is to be fast: tokens of an answer, and for how much of its load it stands.
_ANSWERS: Mapping[Goal, tuple[int, float]] = {"caption": (16, 1), "chat": (160, 0), "both": (48, 0)}
# Rows of a question beside its picture's.
_QUESTION = 24
_COMPARISONS = 8


def tune(
    folder: Path,
    goal: Goal = "both",
    *,
    seconds: float = 150.0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Tuning:
    """Measures a bundle's settings on the CPU of this machine; `tuned.remember` keeps them.

    With the goal "both" every command gets the settings for what it does, otherwise all of them
    those for the one goal. What does not fit into `seconds` is skipped and stays as it is. Raises
    BundleError, and PromptError for a bundle without a decoder.
    """
    check_path(folder)
    bundle = open_bundle(folder)
    if "decoder" not in bundle.manifest.components:
        raise PromptError(f"{bundle.manifest.name}: has no decoder to tune for")
    features = ggml.cpu_features()
    held = {g: choose(bundle, LoadOptions(goal=g), features, tunings=False)[0] for g in GOALS}
    measuring = _Measuring(bundle, held, time.monotonic() + seconds, progress)
    measuring.vision()
    repacking = measuring.decoder()
    found = {g: replace(measuring.best, repacking=repacking[g]) for g in GOALS}
    return Tuning(
        format=tuned.FORMAT,
        machine=tuned.facts(features),
        files=tuned.files(bundle),
        goals={g: found[g if goal == "both" else goal] for g in GOALS},
        compared=tuple(measuring.compared),
        skipped=tuple(measuring.skipped),
    )


def thread_counts() -> list[int]:
    """Numbers of threads worth a comparison, the physical cores first."""
    cores, logical = physical_cores(), usable_cpus()
    return list(dict.fromkeys(n for n in (cores, logical, cores - 1, cores // 2) if n >= 1))


def cost_ms(
    repacking: Repacking, goal: Goal, rows: int, times: Mapping[str, Mapping[str, float]]
) -> float:
    """Milliseconds of an answer to `rows` of input as the goal weighs it.

    `times` holds milliseconds of "load", "prefill" (a row) and "decode" (a token) with the weights
    in their file's order ("off") and re-ordered ("on").
    """
    reading: Repacking = "on" if repacking == "on" else "off"
    drawing: Repacking = "off" if repacking == "off" else "on"
    tokens, share = _ANSWERS[goal]
    load = sum(times["load"][order] for order in {reading, drawing})
    return load * share + rows * times["prefill"][reading] + tokens * times["decode"][drawing]


class _Measuring:
    """The comparisons so far, and the best settings that they leave."""

    def __init__(
        self,
        bundle: Bundle,
        held: Mapping[Goal, EngineSettings],
        deadline: float,
        progress: Callable[[Progress], None],
    ) -> None:
        self.best = held["both"]
        self.compared: list[Compared] = []
        self.skipped: list[str] = []
        self._bundle, self._held = bundle, held
        self._deadline, self._progress = deadline, progress
        self._done = 0

    def vision(self) -> None:
        """Compares precisions and threads of the encoder."""
        there = self._bundle.vision_precisions
        first = pick(self.best.vision, there)
        precisions = {p: replace(self.best, vision=(p,)) for p in dict.fromkeys((first, *there))}
        self.best = self._encoders("precision", precisions)
        counts = {str(n): replace(self.best, vision_threads=n) for n in thread_counts()}
        self.best = self._encoders("threads", counts)

    def _encoders(self, name: str, choices: Mapping[str, EngineSettings]) -> EngineSettings:
        pixels = picture(measured_side(self._bundle.manifest.image))
        with ExitStack() as stack:
            runs = {}
            for word, settings in choices.items():
                encoder = stack.enter_context(closing(self._encoder(settings)))
                runs[word] = partial(_encode_ms, encoder, pixels, self._bundle.manifest.image)
            return choices[self._compare(name, "vision", runs)[0]]

    def _encoder(self, settings: EngineSettings) -> OrtEncoder:
        wish = Wish("cpu", settings.vision_threads, settings.spinning, settings.vision)
        return open_encoder(self._bundle, wish)[0]

    def decoder(self) -> dict[Goal, Repacking]:
        """Compares the decoder's settings; returns the repacking that is best for each goal."""
        with ExitStack() as stack:
            both: dict[str, LlamaDecoder] = {}
            times: dict[str, dict[str, float]] = {"load": {}}
            for order in ("off", "on"):
                start = time.perf_counter()
                opened = single(self._bundle, self.best, repack=order == "on")
                both[order] = stack.enter_context(closing(opened))
                times["load"][order] = (time.perf_counter() - start) * 1e3
            prefills = {order: partial(self._prefill_ms, both[order]) for order in both}
            reader, times["prefill"] = self._compare("repacking", "prefill", prefills)
            steps = {order: partial(self._decode_ms, both[order]) for order in both}
            writer, times["decode"] = self._compare("repacking", "decode", steps)
            self._read_settings(both[reader])
            self._draw_settings(both[writer])
            self._spinning(both[writer])
        return self._repacking(times)

    def _repacking(self, times: dict[str, dict[str, float]]) -> dict[Goal, Repacking]:
        """The repacking that costs each goal least, the one held where that wins too little."""
        best = {goal: settings.repacking for goal, settings in self._held.items()}
        if not all(times.values()):
            return best
        rows = plan(*PHOTO, self._bundle.manifest.image).rows + _QUESTION
        times["prefill"] = {order: ms / _ROWS for order, ms in times["prefill"].items()}
        for goal, held in best.items():
            others: list[Repacking] = [held, "off", "on", "decode"]
            best[goal] = winner({r: cost_ms(r, goal, rows, times) for r in others})
        return best

    def _read_settings(self, decoder: LlamaDecoder) -> None:
        best, run = self.best, self._prefill_ms
        counts = {str(n): replace(best, prefill_threads=n) for n in thread_counts()}
        self._settle("threads", "prefill", decoder, counts, run)
        ways: tuple[FlashAttention, ...] = ("auto", "off")
        attentions = {str(way): replace(self.best, flash_attention=way) for way in ways}
        self._settle("flash attention", "prefill", decoder, attentions, run)
        if self._bundle.manifest.decoder.attention != "prefix":
            sizes = {str(n): replace(self.best, batch=n) for n in _BATCHES}
            self._settle("batch", "prefill", decoder, sizes, partial(run, rows=2 * _ROWS))

    def _draw_settings(self, decoder: LlamaDecoder) -> None:
        counts = {str(n): replace(self.best, decode_threads=n) for n in thread_counts()}
        self._settle("threads", "decode", decoder, counts, self._decode_ms)

    def _settle(
        self,
        name: str,
        part: str,
        decoder: LlamaDecoder,
        choices: Mapping[str, EngineSettings],
        run: Callable[[LlamaDecoder], float],
    ) -> None:
        """Compares settings of one decoder and takes the best."""

        def measured(settings: EngineSettings) -> float:
            _adjust(decoder, settings)
            return run(decoder)

        runs = {word: partial(measured, settings) for word, settings in choices.items()}
        self.best = choices[self._compare(name, part, runs)[0]]
        _adjust(decoder, self.best)

    def _spinning(self, decoder: LlamaDecoder) -> None:
        """Compares waits of onnxruntime's workers on tokens drawn right after a picture."""
        image = self._bundle.manifest.image
        pixels = picture(measured_side(image))
        with ExitStack() as stack:

            def run(encoder: OrtEncoder) -> float:
                return _encode_ms(encoder, pixels, image) + _TOKENS * self._decode_ms(decoder)

            choices = {
                word: replace(self.best, spinning=word == "on")
                for word in (("on", "off") if self.best.spinning else ("off", "on"))
            }
            runs = {
                word: partial(run, stack.enter_context(closing(self._encoder(settings))))
                for word, settings in choices.items()
            }
            self.best = choices[self._compare("spinning", "vision, then decode", runs)[0]]

    def _block(self, decoder: LlamaDecoder, rows: int) -> Block:
        spec = self._bundle.manifest.decoder
        ids = np.random.default_rng(0).integers(0, spec.n_vocab, rows).tolist()
        attention: BlockAttention = "bidirectional" if spec.attention == "prefix" else "causal"
        return sequential(decoder.embed(ids), attention, mrope=spec.positions == "mrope")

    def _prefill_ms(self, decoder: LlamaDecoder, rows: int = _ROWS) -> float:
        block = self._block(decoder, min(rows, self._bundle.manifest.decoder.context_length // 2))
        decoder.clear()
        return _ms(lambda: decoder.prefill([block], room=_TOKENS), decoder.cancel)

    def _decode_ms(self, decoder: LlamaDecoder) -> float:
        """The median of some tokens, in milliseconds."""
        block = self._block(decoder, 8)
        decoder.clear()
        _ms(lambda: decoder.prefill([block], room=_TOKENS), decoder.cancel)
        return statistics.median(
            _ms(partial(decoder.step, 0), decoder.cancel) for _ in range(_TOKENS)
        )

    def _compare(
        self, name: str, part: str, runs: Mapping[str, Callable[[], float]]
    ) -> tuple[str, dict[str, float]]:
        """The best choice, the first one where none is worth a change, and the milliseconds of
        each; none of those where there was nothing to compare or no time.
        """
        self._progress(Progress(f"{part}: {name}", self._done, _COMPARISONS, "comparisons"))
        self._done += 1
        first = next(iter(runs))
        if len(runs) < 2:
            return first, {}
        if not (times := fastest(runs, lambda: time.monotonic() > self._deadline)):
            self.skipped.append(f"{part}: {name}")
            return first, {}
        chosen = winner(times)
        self.compared.append(Compared(name, part, times, chosen))
        return chosen, times


def fastest(
    runs: Mapping[str, Callable[[], float]], over: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """The fastest run of each choice, in milliseconds, with the choices in turn; empty where the
    time was `over` before each had its first.

    The first run of each warms up, and counts where it is the only one.
    """
    times: dict[str, list[float]] = {word: [] for word in runs}
    for round_ in range(_ROUNDS + 1):
        for word in _hopeful(times):
            if over():
                return {w: min(t) for w, t in times.items()} if all(times.values()) else {}
            ms = runs[word]()
            times[word] = [ms] if round_ < 2 else [*times[word], ms]
    return {word: min(found) for word, found in times.items()}


def _hopeful(times: Mapping[str, Sequence[float]]) -> list[str]:
    """The choices worth another run, the first one always."""
    if not all(times.values()):
        return list(times)
    best, first = min(map(min, times.values())), next(iter(times))
    return [word for word, t in times.items() if word == first or min(t) < _HOPELESS * best]


def winner(times: Mapping[W, float]) -> W:
    """The choice that took the least, if that is worth leaving the first one."""
    first, best = next(iter(times)), min(times, key=lambda word: times[word])
    return best if times[best] < (1 - WORTH) * times[first] else first


def _adjust(decoder: LlamaDecoder, settings: EngineSettings) -> None:
    s = settings
    decoder.adjust(s.decode_threads, s.prefill_threads, s.batch, s.flash_attention)


def _encode_ms(encoder: OrtEncoder, pixels: Float, image: ImageSpec) -> float:
    def encode() -> Float:
        features = encoder.features(pixels)
        return encoder.project(for_projector(features, pixels.shape[:1:-1], image))

    return _ms(encode, encoder.cancel)


def _ms(call: Callable[[], object], stop: Callable[[], None]) -> float:
    """Milliseconds of a call, on the thread that all of decoding runs on."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return interruptible(timed, stop)
