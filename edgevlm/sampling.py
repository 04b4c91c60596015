"""Sampling options: one frozen dataclass, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

from edgevlm.errors import PromptError
from edgevlm.specs import AnswerSpec

# A printed page of text; other answers are a sentence or a list.
_PAGE_TOKENS = 1024


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that `ask`, `stream` and their kin take; see Sampling."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | tuple[str, ...] | list[str]


def task_options(task: str, spec: AnswerSpec) -> SamplingOptions:
    """Options that a model's own task has where the caller names none."""
    return {"max_tokens": max(_PAGE_TOKENS, spec.max_tokens)} if task == "ocr" else {}


@dataclass(frozen=True)
class Sampling:
    """Options of one answer.

    max_tokens: longest answer in tokens; None for the model's own default.
    temperature: 0 is greedy; the chain is repetition penalty, top-k, top-p, min-p, temperature.
    top_k, top_p, min_p: 0, 1 and 0 switch them off.
    repetition_penalty: divides (or multiplies) the logits of tokens that the answer already has.
    seed: random seed, 0..2**32-2; None for a new one each time.
    stop: strings that end the answer; they are not part of it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        _require(_finite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        _require(self.top_k >= 0, "top_k", "0 or more")
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        _require(
            _finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "above 0",
        )
        _require(self.seed is None or 0 <= self.seed < 2**32 - 1, "seed", "from 0 to 2**32 - 2")
        _require(all(self.stop), "stop", "strings that are not empty")

    @classmethod
    def of(cls, options: SamplingOptions) -> Sampling:
        """Builds it from keyword arguments; `stop` may be one string or several."""
        values: dict[str, Any] = dict(options)
        stop = values.get("stop", ())
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**values)


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _require(ok: bool, name: str, range_: str) -> None:
    if not ok:
        raise PromptError(f"{name} must be {range_}")
