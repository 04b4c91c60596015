"""One round in one process: load, a first answer, pairs of a new and a known picture, bare decode.

Everything goes through the runtime's own Answer, so what is timed is what users get. The manifest
is changed in one point: no token ends an answer, so that each has the same number of tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgevlm.benchmarks.latency.memory import MemoryMarks
from edgevlm.benchmarks.latency.sensors import Sensors
from edgevlm.errors import PromptError
from edgevlm.runtimes.engines import Float, VisionEncoder, sequential
from edgevlm.runtimes.model import Engines, Stopwatch
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.types import Reply

# How deep the context of the long-context rate is, where the model's own context allows it.
LONG_CONTEXT = 1024
_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class RoundTask:
    """The task of one round, as the parent sends it to the worker.

    prompt: None for the model's own caption prompt. tokens: length of every answer. A pair is an
    answer about a new picture and one about the same again; there are at least one and at most
    `pairs`, as many as fit into `seconds`.
    """

    folder: str
    image: str
    device: str
    threads: int | None
    prompt: str | None
    tokens: int
    pairs: int
    seconds: float


@dataclass(frozen=True)
class Event:
    """A report of the worker's: samples by metric, and facts about the configuration."""

    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)


Emit = Callable[[Event], None]
# Loads the model, its engines side by side or, where somebody wants to be told "vision" and
# "decoder" as each stands, one after the other.
Open = Callable[[Callable[[str], None] | None], VLM]


def measure(
    task: RoundTask, open_model: Open, memory: MemoryMarks, sensors: Sensors, emit: Emit
) -> None:
    """Runs one round and emits what it found, piece by piece. Raises EdgeVLMError."""
    memory.mark("base")
    cold = memory.drop_file_cache(Path(task.folder))
    before = memory.bytes_read()
    vlm = open_model(memory.mark)
    why_not = cold or memory.why_not_cold(before, Path(task.folder))
    if why_not:
        emit(Event(unavailable={"load_cold_ms": why_not}))
    else:
        emit(Event({"load_cold_ms": (vlm.load_ms,)}))
    prompt = task.prompt if task.prompt is not None else _default_prompt(vlm)
    with vlm:
        _answers(_Round(task, prompt, sensors, emit), vlm, memory)
        facts = {"energy": sensors.energy}
        emit(Event(memory.samples(), facts, sensors.unavailable()))
        emit(_bare_decode(vlm.engines, task.tokens))
    gc.collect()
    with open_model(None) as again:
        emit(Event({"load_warm_ms": (again.load_ms,)}))


@dataclass(frozen=True)
class _Round:
    """State shared by the answers of a round."""

    task: RoundTask
    prompt: str
    sensors: Sensors
    emit: Emit


def _answers(shared: _Round, vlm: VLM, memory: MemoryMarks) -> None:
    encoder = _Marking(vlm.engines.encoder, memory)
    reply = _ask(shared, endless(vlm, encoder), warm=False)[0]
    memory.mark("answered")
    cold = {"first_token_cold_ms": (reply.timings.first_token_ms,)}
    shared.emit(Event(cold, {"vision_positions": encoder.positions}))
    start, asked = time.perf_counter(), endless(vlm, vlm.engines.encoder)
    for _ in range(shared.task.pairs):
        asked.forget()
        reply, samples = _ask(shared, asked, warm=True)
        again = _ask(shared, asked, warm=False)[0]
        samples["first_token_cached_ms"] = (again.timings.first_token_ms,)
        shared.emit(Event(samples, _workload(shared, reply, again)))
        if time.perf_counter() - start > shared.task.seconds:
            return


def endless(vlm: VLM, encoder: VisionEncoder) -> VLM:
    """The same model, whose answers go on until they have the number of tokens asked for."""
    manifest = vlm.manifest
    answer = replace(manifest.answer, stop_tokens=(), stop_strings=())
    return VLM(
        replace(manifest, answer=answer), vlm.engines.family, encoder, vlm.engines.decoder,
        newline=vlm.engines.newline, load_ms=vlm.load_ms,
    )  # fmt: skip


def _ask(shared: _Round, vlm: VLM, *, warm: bool) -> tuple[Reply, dict[str, tuple[float, ...]]]:
    """One whole answer; its samples are taken only where `warm` says they count."""
    task, sensors = shared.task, shared.sensors
    before, cpu = sensors.read(), time.process_time()
    answer = vlm.stream(shared.prompt, task.image, max_tokens=task.tokens)
    elapsed = [piece.elapsed_ms for piece in answer if piece.token_ids]
    cpu_s, after, reply = time.process_time() - cpu, sensors.read(), answer.reply
    if reply.tokens.generated < task.tokens:
        raise PromptError(
            f"the context leaves room for {reply.tokens.generated} of {task.tokens} tokens; "
            "ask for fewer or shorten the prompt"
        )
    if not warm:
        return reply, {}
    t = reply.timings
    samples: dict[str, tuple[float, ...]] = {
        "first_token_warm_ms": (t.first_token_ms,),
        "image_decode_ms": (t.image_decode_ms,),
        "preprocess_ms": (t.preprocess_ms,),
        "vision_ms": (t.vision_ms,),
        "projector_ms": (t.projector_ms,),
        "prefill_ms": (t.prefill_ms,),
        "prefill_tokens_per_s": (reply.prefill_tokens_per_s,),
        "inter_token_ms": tuple(b - a for a, b in pairwise(elapsed)),
        "decode_tokens_per_s": (reply.decode_tokens_per_s,),
        "end_to_end_ms": (t.total_ms,),
        "cpu_ms": (cpu_s * 1e3,),
    }
    optional = {
        "energy_j": sensors.joules(before, after),
        "temperature_c": after.temperature_c,
        "frequency_mhz": after.frequency_mhz,
    }
    return reply, samples | {name: (v,) for name, v in optional.items() if v is not None}


def _workload(shared: _Round, reply: Reply, again: Reply) -> dict[str, Any]:
    return {
        "prompt": shared.prompt,
        "image_tokens": reply.tokens.image,
        "text_tokens": reply.tokens.text,
        "cached_tokens": again.tokens.cached,
        "generated": reply.tokens.generated,
    }


def _bare_decode(engines: Engines, tokens: int) -> Event:
    """The decoder alone, behind one position and behind a long context."""
    deep = min(LONG_CONTEXT, engines.manifest.decoder.context_length - tokens)
    return Event(
        {
            "decode_empty_tokens_per_s": (_decode_rate(engines, 1, tokens),),
            "decode_long_tokens_per_s": (_decode_rate(engines, deep, tokens),),
        },
        {"long_context": deep},
    )


def _decode_rate(engines: Engines, depth: int, tokens: int) -> float:
    """Tokens per second of `tokens` greedy steps behind `depth` begin tokens."""
    decoder = engines.decoder
    rows = decoder.embed([decoder.bos] * depth)
    mrope = engines.manifest.decoder.positions == "mrope"
    decoder.prefill([sequential(rows, "causal", mrope=mrope)], room=tokens)
    sampler = decoder.sampler(Sampling())
    try:
        token = sampler.sample()
        start = time.perf_counter()
        for _ in range(tokens):
            decoder.step(token)
            token = sampler.sample()
        return tokens / (time.perf_counter() - start)
    finally:
        sampler.close()


def _default_prompt(vlm: VLM) -> str:
    return vlm.task("caption") if "caption" in vlm.manifest.prompt.tasks else _QUESTION


class _Marking:
    """A VisionEncoder that counts positions, of all tiles, and notes the memory after a picture."""

    def __init__(self, encoder: VisionEncoder, memory: MemoryMarks) -> None:
        self._encoder, self._memory = encoder, memory
        self.provider = encoder.provider
        self.positions = 0

    def features(self, pixels: Float) -> Float:
        """See VisionEncoder."""
        features = self._encoder.features(pixels)
        self.positions += features.shape[0] * features.shape[1]
        return features

    def project(self, features: Float) -> Float:
        """See VisionEncoder."""
        rows = self._encoder.project(features)
        self._memory.mark("seen")
        return rows

    def cancel(self) -> None:
        """See VisionEncoder."""
        self._encoder.cancel()

    def release(self) -> None:
        """See VisionEncoder."""
        self._encoder.release()

    def close(self) -> None:
        """See VisionEncoder."""
        self._encoder.close()


def overhead_ms(batches: int = 21, times: int = 100) -> float:
    """The stopwatch's reading for a stage that does nothing: the median of several means, so that
    another program's turn on this core is not taken for the stopwatch's.
    """
    means = []
    for _ in range(batches):
        watch = Stopwatch()
        for _ in range(times):
            with watch.timed("empty"):
                pass
        means.append(watch.ms["empty"] / times)
    return statistics.median(means)
