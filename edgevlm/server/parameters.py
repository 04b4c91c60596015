"""The body of a chat completion -> a checked request.

Every parameter of OpenAI's is one of four kinds: it does what it does there; it changes nothing in
an answer and is passed over; it is accepted at the value that changes nothing; or it is refused by
name. Nothing is left out without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from edgevlm.errors import PromptError
from edgevlm.sampling import Sampling, SamplingOptions
from edgevlm.server.messages import ReadMessage, read_messages
from edgevlm.server.pictures import Pictures
from edgevlm.server.problems import Problem, invalid, quoted

_MOST_STOPS = 4
_MOST_LIKELY = 20
_SEEDS = 2**32 - 1

_PASSED_OVER = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Accepted at these values, at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request: `options` are those of edgevlm.sampling.Sampling; `stream` asks for events
    and `include_usage` for the counts at their end.
    """

    model: str
    messages: list[ReadMessage]
    options: SamplingOptions
    stream: bool = False
    include_usage: bool = False


def read_request(body: bytes, pictures: Pictures) -> ChatRequest:
    """Reads a body; blocks while pictures and videos are downloaded. Raises Problem."""
    given = json_object(body)
    _check_names(given)
    stream = _boolean(given, "stream")
    options = _options(given)
    messages = read_messages(given.get("messages"), pictures)
    return ChatRequest(model_name(given), messages, options, stream, _include_usage(given, stream))


def json_object(body: bytes) -> dict[str, Any]:
    """The object in a body, without what is null: that is as good as not given. Raises Problem."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as e:
        raise invalid(f"the body is not valid JSON ({quoted(str(e))[1:-1]})") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    return {name: v for name, v in value.items() if v is not None}


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                shown = " or ".join(map(json.dumps, _NEUTRAL[name]))
                cure = f"leave it out or set it to {shown}" if shown else "leave it out"
                raise _unsupported(name, f"{name} is not supported here; {cure}")
        elif name not in _PASSED_OVER and name not in _READ:
            raise _unsupported(
                name, f"{quoted(name)} is not a parameter that is known here; leave it out"
            )


def _same(value: Any, neutral: Any) -> bool:
    # To Python true is 1.
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _unsupported(name: str, message: str) -> Problem:
    return invalid(message, name, "unsupported_parameter")


def model_name(given: Mapping[str, Any]) -> str:
    """The model that a body names. Raises Problem."""
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model must be the name of a model; GET /v1/models lists them", "model")
    return model


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise invalid("stream_options must be an object", "stream_options")
    if options and not stream:
        raise invalid("stream_options goes with stream", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    # Padding against an eavesdropper who counts bytes; there is none here, and off is the default.
    unknown = [name for name in options if name not in ("include_usage", "include_obfuscation")]
    if unknown:
        raise _unsupported(
            f"stream_options.{unknown[0]}", f"stream_options has no {quoted(unknown[0])} here"
        )
    return _boolean(options, "include_usage")


def _options(given: Mapping[str, Any]) -> SamplingOptions:
    options: dict[str, Any] = {}
    for name, read in _OPTIONS.items():
        if name in given:
            options[name] = read(given[name], name)
    options |= _max_tokens(given) | _logprobs(given) | _schema(given)
    made = cast(SamplingOptions, options)
    try:
        Sampling.of(made)
    except PromptError as e:
        first = str(e).partition(" ")[0]
        raise invalid(str(e), first if first in _OPTIONS else "response_format") from None
    return made


def _max_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    values = {_integer(given[name], name) for name in names}
    if len(values) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    if any(value < 1 for value in values):
        raise invalid(f"{names[0]} must be at least 1", names[0])
    return {"max_tokens": values.pop()} if values else {}


def _logprobs(given: Mapping[str, Any]) -> dict[str, Any]:
    wanted = _boolean(given, "logprobs")
    if not wanted:
        if "top_logprobs" in given:
            raise invalid("top_logprobs goes with logprobs", "top_logprobs")
        return {}
    top = _integer(given.get("top_logprobs", 0), "top_logprobs")
    if not 0 <= top <= _MOST_LIKELY:
        raise invalid(f"top_logprobs must be from 0 to {_MOST_LIKELY}", "top_logprobs")
    return {"logprobs": top}


def _schema(given: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that the answer must fulfil, where there is one."""
    asked = given.get("response_format", {"type": "text"})
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    if kind != "json_schema":
        raise invalid(
            f"response_format has the type {quoted(kind)}; use text, json_object or json_schema",
            "response_format.type",
        )
    named = asked.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise invalid(
            "response_format.json_schema must have a schema, which is an object",
            "response_format.json_schema.schema",
        )
    return {"schema": schema}


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"{name} must be true or false", name)
    return value


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"{name} must be a whole number", name)
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"{name} must be a number", name)
    try:
        return float(value)
    except OverflowError:
        raise invalid(f"{name} is too large", name) from None


def _seed(value: Any, name: str) -> int:
    """A seed in the engine's range; elsewhere it has 64 bits and a sign."""
    return _integer(value, name) % _SEEDS


def _stops(value: Any, name: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise invalid(f"{name} must be a text or a list of texts", name)
    if len(stops) > _MOST_STOPS:
        raise invalid(f"{name} has more than {_MOST_STOPS} texts", name)
    return tuple(stops)


# Options that go to the engine under their own names; the last three are beyond OpenAI's.
_OPTIONS: dict[str, Callable[[Any, str], Any]] = {
    "temperature": _number,
    "top_p": _number,
    "seed": _seed,
    "stop": _stops,
    "top_k": _integer,
    "min_p": _number,
    "repetition_penalty": _number,
}
_READ = {
    *_OPTIONS,
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "response_format",
    "stream",
    "stream_options",
    "top_logprobs",
}
