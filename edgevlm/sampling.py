"""Sampling options: one frozen dataclass, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypedDict

from edgevlm import gbnf
from edgevlm.errors import PromptError
from edgevlm.json_schema import schema_grammar
from edgevlm.schema import finite
from edgevlm.specs import AnswerSpec
from edgevlm.types import Constraint

# A printed page of text; other answers are a sentence or a list.
_PAGE_TOKENS = 1024
# The bound that other APIs have; each costs a line of JSON for every token.
_MOST_LIKELY = 20


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
    logprobs: int
    schema: Any
    choices: Sequence[str]
    grammar: str


def task_options(task: str, spec: AnswerSpec) -> SamplingOptions:
    """Options that a model's own task has where the caller names none."""
    return {"max_tokens": max(_PAGE_TOKENS, spec.max_tokens)} if task == "ocr" else {}


@dataclass(frozen=True)
class Sampling:
    """Options of one answer.

    * max_tokens: longest answer in tokens; None for the model's own default.
    * temperature: 0 is greedy; the chain is repetition penalty, top-k, top-p, min-p, temperature.
    * top_k, top_p, min_p: 0, 1 and 0 switch them off.
    * repetition_penalty: divides (or multiplies) the logits of tokens that the answer already has.
    * seed: random seed, 0..2**32-2; None for a new one each time.
    * stop: strings that end the answer; they are not part of it.
    * logprobs: log-probabilities of the answer's tokens, each with so many of the likeliest tokens
      in its place, 0..20; None for no log-probabilities at all.
    * schema: the JSON schema that the answer fits, as a dictionary, or a class of pydantic's.
    * choices: strings, one of which is the answer.
    * grammar: llama.cpp's grammar (GBNF) of the answer.

    At most one of the last three; `constraint` is what became of it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: Any = None
    choices: tuple[str, ...] = ()
    grammar: str | None = None
    constraint: Constraint | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        _require(finite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        _require(0 <= self.top_k < 2**31, "top_k", "from 0 to 2**31 - 1")
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        _require(
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "above 0",
        )
        _require(self.seed is None or 0 <= self.seed < 2**32 - 1, "seed", "from 0 to 2**32 - 2")
        _require(all(self.stop), "stop", "strings that are not empty")
        likely = self.logprobs
        ok = likely is None or (isinstance(likely, int) and 0 <= likely <= _MOST_LIKELY)
        _require(ok, "logprobs", f"from 0 to {_MOST_LIKELY}")
        object.__setattr__(self, "constraint", _constraint(self))

    def longest(self, spec: AnswerSpec) -> int:
        """The longest answer in tokens; one that is held to a form has to be whole."""
        page = self.constraint is not None and self.constraint.kind != "choices"
        return self.max_tokens or (max(_PAGE_TOKENS, spec.max_tokens) if page else spec.max_tokens)

    @classmethod
    def of(cls, options: SamplingOptions) -> Sampling:
        """Builds it from keyword arguments; `stop` may be one string or several. Raises
        PromptError.
        """
        values: dict[str, Any] = dict(options)
        if values.get("choices") is not None:
            choices = values["choices"]
            single = isinstance(choices, (str, bytes, Mapping)) or not isinstance(choices, Sequence)
            _require(not single and len(choices) > 0, "choices", "a list of one string or more")
            values["choices"] = tuple(choices)
        else:
            values.pop("choices", None)
        stop = values.get("stop", ())
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**values)


def _constraint(options: Sampling) -> Constraint | None:
    """The form that an answer is held to; raises PromptError for one that cannot be."""
    given = [n for n in ("schema", "choices", "grammar") if getattr(options, n) not in (None, ())]
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)} cannot be had at once; choose one")
    if options.grammar is not None:
        _require(isinstance(options.grammar, str), "grammar", "the text of a grammar")
        gbnf.check(options.grammar)
        return Constraint("grammar", options.grammar)
    if options.choices:
        return _among(options.choices)
    return None if options.schema is None else _fitting(options.schema)


def _among(choices: tuple[str, ...]) -> Constraint:
    ok = all(isinstance(c, str) and c and c == c.strip() and "\0" not in c for c in choices)
    _require(ok, "choices", "strings that are not empty, without blanks around them or a NUL")
    rules: dict[str, str] = {}
    rules["root"] = gbnf.alternatives(choices, "choice", rules)
    grammar = _checked("".join(f"{name} ::= {body}\n" for name, body in rules.items()))
    return Constraint("choices", grammar, choices)


def _fitting(schema: Any) -> Constraint:
    model = schema if callable(getattr(schema, "model_json_schema", None)) else None
    found = schema.model_json_schema() if model is not None else schema
    if not isinstance(found, (Mapping, bool)):
        raise PromptError(
            "schema must be a JSON schema as a dictionary, or a class with model_json_schema, not "
            f"{type(schema).__name__}"
        )
    grammar = schema_grammar(found)
    try:
        return Constraint("schema", _checked(grammar), model=model)
    except PromptError:
        raise PromptError(
            "the schema's $ref leads back to itself without an end; give it an alternative "
            "without itself, such as null"
        ) from None


@lru_cache(maxsize=16)
def _checked(grammar: str) -> str:
    """The grammar; raises PromptError for one that llama.cpp cannot use."""
    gbnf.check(grammar)
    return grammar


def _require(ok: bool, name: str, range_: str) -> None:
    if not ok:
        raise PromptError(f"{name} must be {range_}")
