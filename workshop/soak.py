"""`python -m workshop.soak [MODEL]`: many threads, one model, everything at random.

Threads ask, stream and break off, score, encode, forget, cancel and close; whoever finds the model
closed loads another. Then a process loads models and closes none. Every answer is compared with the
one that a single thread got. Ends with exit code 1 where one differs, another error than
ModelClosed or PromptError came, or memory grew by more than a twentieth.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import psutil

import edgevlm
from edgevlm.export.parity.images import drawn
from edgevlm.runtimes.session import VLM

_PROMPTS = ("caption en", "answer en what shape is red?", "ocr")
_TOKENS = 12
# The allocator, caches and thread stacks reach their size in the first part of a run.
_WARM_UP = 0.25
_GROWTH = 1.05


class Soak:
    """The model that all threads share, what it must say, and what came of it."""

    def __init__(self, model: str | None) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._pictures = drawn()[:3]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.vlm = edgevlm.load(model)
        self._expected = {
            (name, prompt, i): call(self.vlm, prompt, picture)
            for name, call in _CALLS.items()
            for prompt in _PROMPTS
            for i, picture in enumerate(self._pictures)
        }

    def work(self, seed: int, end: float) -> None:
        """Does one thing after another until time.monotonic reaches `end`."""
        # The allocator keeps some 20 MiB for each thread that ever loaded, which is no growth.
        edgevlm.load(self._model).close()
        rng = random.Random(seed)
        while time.monotonic() < end:
            try:
                self._one(rng)
            except (edgevlm.ModelClosed, edgevlm.PromptError) as error:
                self.counts[type(error).__name__] += 1
                if isinstance(error, edgevlm.ModelClosed):
                    self._load()
            except Exception as error:
                self.faults.append(repr(error))

    def _load(self) -> None:
        with self._lock:
            if self.vlm._turns.closed:
                self.vlm = edgevlm.load(self._model)

    def _one(self, rng: random.Random) -> None:
        vlm, prompt, i = self.vlm, rng.choice(_PROMPTS), rng.randrange(len(self._pictures))
        name = rng.choice((*_CALLS, "break off", "forget", "cancel", "close"))
        if name == "close" and rng.random() < 0.9:
            return
        self.counts[name] += 1
        if name in _CALLS:
            found = _CALLS[name](vlm, prompt, self._pictures[i])
            ended = isinstance(found, str) and found == "cancelled"
            if not ended and not np.array_equal(found, self._expected[name, prompt, i]):
                self.faults.append(f"{name} {prompt!r} of picture {i}: {found!r}")
        elif name == "break off":
            next(vlm.stream(prompt, self._pictures[i], max_tokens=_TOKENS), None)
        else:
            getattr(vlm, name)()


def _ask(vlm: VLM, prompt: str, picture: Any) -> str:
    reply = vlm.ask(prompt, picture, max_tokens=_TOKENS)
    return "cancelled" if reply.finish_reason == "cancelled" else reply.text


def _chat(vlm: VLM, prompt: str, picture: Any) -> str:
    with vlm.chat(picture) as chat:
        reply = chat.ask(prompt, max_tokens=_TOKENS)
    return "cancelled" if reply.finish_reason == "cancelled" else reply.text


_CALLS: dict[str, Callable[[VLM, str, Any], Any]] = {
    "ask": _ask,
    "chat": _chat,
    "score": lambda vlm, prompt, picture: vlm.score(prompt, ["a red", "no"], picture),
    "image_embeddings": lambda vlm, _, picture: vlm.image_embeddings(picture),
}


def growth(mebibytes: list[float]) -> str:
    """Growth of memory after the warm-up, and whether it is flat."""
    warm = mebibytes[int(len(mebibytes) * _WARM_UP) :]
    half = len(warm) // 2
    early, late = np.median(warm[:half]), np.median(warm[half:])
    verdict = "flat" if late <= early * _GROWTH else "grows"
    return f"memory {verdict}: {early:.0f} MiB, then {late:.0f} MiB"


def _rss() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


@click.command()
@click.argument("model", required=False)
@click.option("--minutes", default=5.0, show_default=True, help="Time for the threads.")
@click.option("--threads", default=8, show_default=True, help="Threads that share the model.")
@click.option("--loads", default=300, show_default=True, help="Models to load and not to close.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def main(model: str | None, minutes: float, threads: int, loads: int, seed: int) -> None:
    """Use a model in many threads, and load many, and see whether answers and memory stay."""
    soak, end = Soak(model), time.monotonic() + 60 * minutes
    workers = [threading.Thread(target=soak.work, args=(seed + i, end)) for i in range(threads)]
    for worker in workers:
        worker.start()
    memory = []
    while any(worker.is_alive() for worker in workers):
        memory.append(_rss())
        time.sleep(min(1.0, minutes))
    counts = ", ".join(f"{n} {name}" for name, n in sorted(soak.counts.items()))
    shared = growth(memory)
    click.echo(f"{threads} threads, {minutes:g} min: {counts}; {len(soak.faults)} faults; {shared}")
    for fault in soak.faults[:5]:
        click.echo(f"  {fault}")
    soak.vlm.close()
    memory.clear()
    picture = drawn()[0]
    for _ in range(loads):
        edgevlm.load(model).ask(_PROMPTS[0], picture, max_tokens=1)
        memory.append(_rss())
    loaded = growth(memory) if loads else "memory not measured"
    click.echo(f"{loads} loads, none closed: {loaded}")
    sys.exit(bool(soak.faults or "grows" in shared + loaded))


if __name__ == "__main__":
    main()
