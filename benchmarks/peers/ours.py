"""`python -m edgevlm.benchmarks.peers.ours`: one answer by edgevlm, timed as mtmd.py does it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgevlm.benchmarks.latency.measure import endless
from edgevlm.runtimes.loading import Settings, load_bundle


def answer(given: dict[str, Any]) -> dict[str, float]:
    """Loads everything, asks once to warm up and once to measure; no picture is remembered."""
    with load_bundle(Path(given["bundle"]), Settings(given["threads"])) as vlm:
        asked = endless(vlm, vlm.parts.encoder)
        for _ in range(2):
            asked.forget()
            reply = asked.ask(given["words"], given["image"], max_tokens=given["n_tokens"] + 1)
    timings = reply.timings
    return {
        "encode_ms": timings.vision_ms + timings.projector_ms,
        "first_token_ms": timings.first_token_ms,
        "token_ms": timings.decode_ms / given["n_tokens"],
    }


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.read()))))
