"""Answers in the shape of OpenAI's chat completions, whole and in chunks.

What edgevlm knows beyond that shape is under the key `edgevlm` of the whole answer, or of the last
chunk with a choice.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import edgevlm
from edgevlm.types import Box, Piece, Reply, TokenLogprob

_FINGERPRINT = f"edgevlm-{edgevlm.__version__}"


class Completion:
    """One completion of a model: what its chunks and its whole have in common."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _FINGERPRINT,
        }
        self._include_usage = include_usage

    def whole(self, reply: Reply, *, logprobs: bool) -> dict[str, Any]:
        """The body of an answer that was not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": _logprobs(reply.logprobs) if logprobs else None,
            "finish_reason": reply.finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(reply),
            "edgevlm": _extras(reply),
        }

    def first(self) -> dict[str, Any]:
        """The chunk that begins an answer."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def next(self, piece: Piece, *, logprobs: bool) -> dict[str, Any]:
        """The chunk of a piece."""
        likely = _logprobs(piece.logprobs) if logprobs and piece.logprobs else None
        return self._chunk({"content": piece.text}, logprobs=likely)

    def last(self, reply: Reply) -> list[dict[str, Any]]:
        """The chunks that end an answer."""
        end = self._chunk({}, finish_reason=reply.finish_reason) | {"edgevlm": _extras(reply)}
        if not self._include_usage:
            return [end]
        return [end, self._chunk(None) | {"usage": _usage(reply)}]

    def _chunk(
        self,
        delta: dict[str, Any] | None,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        choices = [] if delta is None else [choice]
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}


def _usage(reply: Reply) -> dict[str, Any]:
    n = reply.tokens
    return {
        "prompt_tokens": n.prompt,
        "completion_tokens": n.generated,
        "total_tokens": n.prompt + n.generated,
        "prompt_tokens_details": {"cached_tokens": n.cached},
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(token), "top_logprobs": [_token(likely) for likely in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    # As OpenAI writes a token of probability zero; JSON has no infinity.
    logprob = max(token.logprob, -9999.0)
    return {"token": token.text, "logprob": logprob, "bytes": [*token.data]}


def _box(box: Box) -> dict[str, Any]:
    """A box; its mask, where there is one, is a picture of the same size, white inside."""
    found = {"x0": box.x0, "y0": box.y0, "x1": box.x1, "y1": box.y1, "label": box.label}
    return found | {"mask": None if box.mask is None else _png_url(box.mask)}


def _png_url(mask: npt.NDArray[np.bool_]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _extras(reply: Reply) -> dict[str, Any]:
    """Boxes in pixels of the upright picture, times in milliseconds, counts of tokens."""
    return {
        "boxes": [_box(box) for box in reply.boxes],
        "timings": {k: round(v, 3) for k, v in dataclasses.asdict(reply.timings).items()},
        "tokens": dataclasses.asdict(reply.tokens),
        "prefill_tokens_per_s": round(reply.prefill_tokens_per_s, 1),
        "decode_tokens_per_s": round(reply.decode_tokens_per_s, 1),
    }
