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
    from edgevlm.runtimes.loading import LoadOptions, load_bundle

    with load_bundle(Path(task["bundle"]), LoadOptions(task["threads"])) as vlm:
        asked = endless(vlm, vlm.engines.encoder)
        for n_tokens in (2, task["n_tokens"] + 1):
            asked.forget()
            reply = asked.ask(task["words"], task["image"], max_tokens=n_tokens)
        before, after = _tokens(vlm, task)
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


def _tokens(vlm: Any, task: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids in front of the picture and behind it, those between its tiles among these."""
    from edgevlm.prompt import Exchange, Image, Tokens
    from edgevlm.runtimes.request import prepare
    from edgevlm.sampling import Sampling

    asked = [Exchange(task["words"], 1)]
    segments = prepare(vlm.engines, asked, [task["image"]], Sampling()).segments
    at = next(i for i, segment in enumerate(segments) if isinstance(segment, Image))
    before, after = ([i for s in side if isinstance(s, Tokens) for i in s.ids]
                     for side in (segments[:at], segments[at:]))  # fmt: skip
    return before, after
