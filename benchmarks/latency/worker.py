"""`python -m edgevlm.benchmarks.latency.worker`: one round; a RoundTask in, Events out, as JSON.

A process of its own, so that no configuration inherits another's memory, threads or caches. The
last line is {"error": ...} where the round failed; without it and without "done" it was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevlm import schema
from edgevlm.benchmarks.latency.measure import Event, RoundTask, measure, overhead_ms
from edgevlm.benchmarks.latency.memory import MemoryMarks
from edgevlm.benchmarks.latency.sensors import Sensors
from edgevlm.errors import EdgeVLMError
from edgevlm.runtimes.llama.ggml import cpu_features
from edgevlm.runtimes.loading import LoadOptions, load_bundle
from edgevlm.runtimes.session import VLM


def run(task: RoundTask, send: Callable[[dict[str, Any]], None]) -> None:
    """Measures one round with the real engines and sends what it finds."""
    overhead = overhead_ms()

    def open_model(loaded: Callable[[str], None] | None) -> VLM:
        vlm = load_bundle(Path(task.folder), LoadOptions(task.threads, task.device), loaded)
        facts = {
            "threads": vlm.settings.threads,
            "repack": vlm.settings.repacking,
            "llama_cpp": cpu_features(),
            "overhead_ms": overhead,
            "provider": vlm.devices.vision.engine,
            "vision_precision": vlm.devices.vision.precision,
            "decoder": vlm.devices.decoder.engine,
            "kv": vlm.settings.kv,
        }
        send({"facts": facts})
        return vlm

    def emit(event: Event) -> None:
        send(dataclasses.asdict(event))

    measure(task, open_model, MemoryMarks(), Sensors(), emit)
    send({"done": True})


def main() -> None:
    """Reads the task from stdin; stdout carries nothing but the events."""
    # Ctrl-C reaches the whole group of processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a native library prints goes to stderr.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    try:
        run(schema.read(RoundTask, json.loads(sys.stdin.read())), send)
    except EdgeVLMError as error:
        send({"error": str(error)})


if __name__ == "__main__":
    main()
