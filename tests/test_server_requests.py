"""Bodies of chat completions: what each parameter becomes, what is refused and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgevlm.server.limits import Limits
from edgevlm.server.parameters import ChatRequest, read_request
from edgevlm.server.pictures import Pictures
from edgevlm.server.problems import Problem
from tests.serving import data_url, png, question


def read(limits: Limits = Limits(), **given: Any) -> ChatRequest:  # noqa: B008
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **given}
    return read_request(json.dumps(body).encode(), Pictures(limits))


def refused(limits: Limits = Limits(), **given: Any) -> Problem:  # noqa: B008
    with pytest.raises(Problem) as caught:
        read(limits, **given)
    return caught.value


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"temperature": 1, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
        ({"temperature": None, "stop": None, "seed": None, "n": None}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"seed": 2**32 - 1}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**32 - 2}),
        ({"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1},
         {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1}),
        ({"logprobs": False}, {}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
        ({"response_format": {"type": "json_schema", "json_schema":
                              {"name": "n", "schema": {"type": "array"}, "strict": True}}},
         {"schema": {"type": "array"}}),
        ({"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
          "tool_choice": "none", "modalities": ["text"], "parallel_tool_calls": True}, {}),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex",
          "safety_identifier": "s", "prompt_cache_key": "k"}, {}),
    ],
)  # fmt: skip
def test_options(given: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(**given).options == options


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"n": 2}, "n", "n is not supported here; leave it out or set it to 1"),
        ({"n": True}, "n", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "set it to 0"),
        ({"presence_penalty": -1}, "presence_penalty", "set it to 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "set it to {}"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "leave it out"),
        ({"temprature": 1}, "temprature", "'temprature' is not a parameter that is known here"),
        ({"best_of": 1}, "best_of", "not a parameter"),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": 10**400}, "temperature", "too large"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"seed": "x"}, "seed", "whole number"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": -3}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "differ"),
        ({"max_tokens": True}, "max_tokens", "whole number"),
        ({"stop": [1]}, "stop", "a text or a list of texts"),
        ({"stop": [""]}, "stop", "strings that are not empty"),
        ({"stop": list("abcde")}, "stop", "more than 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "has no 'x'"),
        ({"stream": True, "stream_options": 1}, "stream_options", "an object"),
        ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"response_format": "json"}, "response_format.type", "use text, json_object or json_sch"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "has the type 'xml'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
         "response_format.json_schema.schema", "must have a schema"),
        ({"model": None}, "model", "name of a model"),
        ({"model": 5}, "model", "name of a model"),
        ({"messages": None}, "messages", "a list with at least one message"),
        ({"messages": []}, "messages", "a list with at least one message"),
        ({"messages": "x"}, "messages", "a list"),
        ({"messages": ["x"]}, "messages[0]", "an object with a role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "developer", "content": "x"}]},
         "messages[1].role", "only the first message may have"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bo"}]}, "messages[0].name",
         "'name', which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[0].content[0].type", "the type 'input_audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text", "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
         "messages[0].content[0].image_url", "an object with a url"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:,", "detail": "max"}}]}]},
         "messages[0].content[0].image_url.detail", "use auto, low or high"),
    ],
)  # fmt: skip
def test_refusals_name_the_parameter(given: dict[str, Any], param: str, said: str) -> None:
    problem = refused(**given)
    assert (problem.status, problem.param) == (400, param)
    assert said in problem.message and "\n" not in problem.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is not a number of JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bodies_that_are_none(body: bytes, said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        read_request(body, Pictures(Limits()))
    assert caught.value.status == 400 and len(caught.value.message) < 300


def test_messages_become_those_of_the_api() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "yes", "annotations": []}
    answer["refusal"] = None
    found = read(messages=[question("a?", png()), answer, question("b?")], stream=True)
    assert found.messages == [
        {
            "role": "user",
            "content": [{"type": "image", "image": png()}, {"type": "text", "text": "a?"}],
        },
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "b?"}]},
    ]
    assert found.stream and not found.include_usage


def test_pictures_have_limits() -> None:
    messages = [question("x", png(40, 30), png(40, 30))]
    assert refused(Limits(pictures=1), messages=messages).code == "too_many_images"
    large = refused(Limits(pixels=1199), messages=messages)
    assert (large.status, large.code) == (413, "image_too_large")
    assert "40 x 30 pixels" in large.message
    together = refused(Limits(pixels=1200), messages=[question("x", *[png(40, 30)] * 3)])
    assert together.status == 413 and "together" in together.message
    assert read(Limits(pixels=1200, pictures=2), messages=messages)


@pytest.mark.fault("Server", "a decompression bomb", "400, by its header")
def test_a_bomb_is_refused_by_its_header() -> None:
    """A few bytes that say that they are a picture of four billion pixels."""
    import struct
    import zlib

    data = bytearray(png())
    data[16:24] = struct.pack(">II", 65500, 65500)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert refused(messages=[question("x", bytes(data))]).status in (400, 413)


def test_what_is_no_picture_is_named_by_its_place() -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(b"text")[:-1] + "!"}}
    problem = refused(messages=[{"role": "user", "content": [part]}])
    assert problem.param == "messages[0].content[0].image_url.url"
    assert problem.code == "invalid_image"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_first_message_may_be_the_systems(role: str) -> None:
    content = [{"type": "text", "text": "be brief"}]
    messages = [{"role": role, "content": content}, {"role": "user", "content": "x"}]
    (first, _) = read(messages=messages).messages
    assert first == {"role": "system", "content": content}
