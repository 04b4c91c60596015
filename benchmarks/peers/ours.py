"""edgevlm itself, timed as its peers are; also tells them how the prompt is tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLE = "edgevlm"
PACKAGE = "edgevlm"
INSTALL = "pip install edgevlm"


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """No picture is remembered from the first question to the second."""
    from edgevlm.benchmarks.latency.measure import endless
    from edgevlm.runtimes.loading import Settings, load_bundle

    with load_bundle(Path(task["bundle"]), Settings(task["threads"])) as vlm:
        asked = endless(vlm, vlm.parts.encoder)
        for n_tokens in (2, task["n_tokens"] + 1):
            asked.forget()
            reply = asked.ask(task["words"], task["image"], max_tokens=n_tokens)
        before, after = _tokens(vlm, task["words"])
        parts = vlm.manifest.components
    timings, tokens = reply.timings, reply.tokens
    return {
        "encode_ms": timings.vision_ms + timings.projector_ms,
        "prefill_ms": timings.prefill_ms,
        "first_token_ms": timings.first_token_ms,
        "token_ms": timings.decode_ms / task["n_tokens"],
        "positions": tokens.image + tokens.text,
        "how": f"{parts['vision'].precision} + {parts['decoder'].precision}",
        "before": before,
        "after": after,
        "image_tokens": tokens.image,
    }


def _tokens(vlm: Any, words: str) -> tuple[list[int], list[int]]:
    """Token ids in front of the picture and behind it."""
    import numpy as np

    from edgevlm.runtimes.request import prepare
    from edgevlm.sampling import Sampling

    picture = np.zeros((8, 8, 3), np.uint8)
    parts = prepare(vlm.parts, words, [picture], Sampling()).parts
    at = next(i for i, part in enumerate(parts) if isinstance(part, int))
    around = (parts[:at], parts[at + 1 :])
    before, after = ([t for part in side if not isinstance(part, int) for t in part]
                     for side in around)  # fmt: skip
    return before, after
