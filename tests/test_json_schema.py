"""JSON schemas as grammars, read by llama.cpp."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

import edgevlm
from edgevlm.errors import PromptError
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.fitting import fits

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}, "tag": {"type": "string"}},
    "required": ["x", "y"],
}
TREE = {
    "$defs": {
        "Tree": {
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
            "required": ["kids"],
        }
    },
    "$ref": "#/$defs/Tree",
}


@pytest.fixture(scope="module")
def pico() -> Iterator[VLM]:
    with edgevlm.load() as vlm:
        yield vlm


def between(kind: str, **bounds: float) -> dict[str, Any]:
    return {"type": kind, **bounds}


@pytest.mark.parametrize(
    ("schema", "fitting", "other"),
    [
        (True, ["1", '{"a": [null, "b"]}', "-1.5e3"], ["", "a", "[1,]"]),
        ({"type": "string"}, ['""', '"a\\n\\u00e9 é🍮"'], ['"\n"', '"\\ud800"', '"\\x"']),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ['"é"', '"ab"'], ['""', '"abc"']),
        ({"type": "string", "minLength": 3}, ['"abc"', '"abcdef"'], ['"ab"']),
        ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-02-30"', '"0000-01-01"']),
        (
            {"type": "string", "format": "date-time"},
            ['"2024-02-28T12:00:00Z"', '"2024-12-31T23:59:59.5+01:00"'],
            ['"2024-02-28"', '"2024-02-28T24:00:00Z"'],
        ),
        ({"type": "integer"}, ["0", "-7", "123"], ["-0", "01", "1.0"]),
        (
            between("integer", minimum=-12, maximum=345),
            ["-12", "-9", "0", "10", "99", "300", "345"],
            ["-13", "346", "400", "1000", "-20", "00"],
        ),
        (between("integer", exclusiveMinimum=0), ["1", "10", "99999"], ["0", "-1"]),
        (between("integer", maximum=-5), ["-5", "-60"], ["-4", "0", "5"]),
        ({"type": "integer", "format": "int32"}, ["2147483647"], ["2147483648"]),
        (
            between("number", minimum=0, maximum=1),
            ["0", "0.5", "1", "1.0", "0.999"],
            ["1.1", "-0.5", "2"],
        ),
        (
            between("number", exclusiveMinimum=-1, exclusiveMaximum=2),
            ["-0.5", "0", "1.99"],
            ["-1", "-1.0", "2", "2.0"],
        ),
        ({"enum": ["a", "ab", 1, None, 'q"\\']}, ['"ab"', "1", "null", '"q\\"\\\\"'], ['"b"']),
        ({"enum": ["a", 1, True], "type": "integer"}, ["1"], ['"a"', "true"]),
        ({"const": {"é": [1]}}, ['{"é": [1]}'], ["{}"]),
        ({"type": ["string", "null"]}, ["null", '"a"'], ["1"]),
        ({"anyOf": [{"type": "null"}, POINT]}, ["null", '{"x": 1, "y": 2}'], ["1"]),
        (
            POINT,
            ['{"x": 1, "y": 2}', '{"x":1,"y":2,"tag":"a"}', '{ "x": 1, "y": 2 }'],
            ['{"x": 1}', '{"y": 2, "x": 1}', '{"x": 1, "y": 2, "z": 3}', '{"x": 1, "y": 2} '],
        ),
        (
            {"type": "object", "properties": {"a": True, "b": True}},
            ["{}", '{"a": 1}', '{"b": 1}', '{"a": 1, "b": 2}'],
            ['{"b": 1, "a": 1}', '{"a": 1,}', "{,}"],
        ),
        (
            {"properties": {"ab": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            ["{}", '{"ab": null, "a": 1, "abc": 2, "b": 3, "": 4}', '{"x": 1}'],
            ['{"ab": 1}', '{"a\\u0062": 1}', '{"x": null}'],
        ),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
        ({"type": "object", "required": ["a"]}, ['{"a": 1}', '{"a": 1, "b": 2}'], ["{}"]),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3},
            ["[null]", "[null, null, null]"],
            ["[]", "[null, null, null, null]"],
        ),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        (
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}]},
            ["[null, 1]"],
            ["[null]", "[null, 1, 2]", "[1, null]"],
        ),
        (TREE, ['{"kids": []}', '{"kids": [{"kids": []}, {"kids": []}]}'], ["[]", '{"kids": [1]}']),
    ],
)
def test_what_fits_a_schema(pico: VLM, schema: Any, fitting: list[str], other: list[str]) -> None:
    form = Sampling(schema=schema).constraint
    assert form
    for text in fitting:
        assert fits(pico, form.grammar, text), text
        assert form.read(text) == json.loads(text)
    assert not [text for text in other if fits(pico, form.grammar, text)]


def test_lengths_beyond_the_repetitions_of_llama_cpp(pico: VLM) -> None:
    form = Sampling(schema={"type": "string", "minLength": 1506, "maxLength": 2508}).constraint
    assert form
    for n, ok in ((250, False), (251, True), (418, True), (419, False)):
        assert fits(pico, form.grammar, f'"{"circle" * n}"') is ok


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": [{}]}, "#/type {} is unknown"),
        ({"type": "string", "maxLength": "5"}, "#/maxLength must be from 0 to"),
        ({"type": "strng"}, "#/type 'strng' is unknown"),
        ({"type": "string", "pattern": "a"}, "#/pattern cannot be held to"),
        ({"type": "string", "format": "email"}, "#/format 'email' cannot be held to"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems cannot be held to"),
        ({"type": "integer", "multipleOf": 2}, "#/multipleOf cannot be held to"),
        ({"type": "integer", "maximum": 10**400}, "#/maximum must be a number below 1.8e308"),
        ({"type": "number", "minimum": 0.5}, "whole bounds only"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "# allows no value"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a/not cannot be held to"),
        ({"anyOf": [], "title": "x"}, "#/anyOf must be a list that is not empty"),
        ({"anyOf": [{}], "properties": {}}, "#/properties cannot be held to, beside anyOf"),
        ({"allOf": [{}, {}]}, "#/allOf has several schemas"),
        ({"enum": []}, "# allows no value"),
        ({"enum": ["a"], "type": "integer"}, "# allows no value"),
        ({"enum": [float("nan")]}, "holds a value that is not JSON"),
        ({"$ref": "#/nowhere"}, "there is no 'nowhere'"),
        ({"$ref": "other.json"}, "only #/... within it is followed"),
        ({"$ref": "#"}, "leads back to itself without an end"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "back to itself without an end"),
        ({"additionalProperties": False, "properties": {}, "required": ["a"]}, "does not allow"),
        ({"items": [{}]}, "write it as prefixItems"),
        ({"type": "string", "maxLength": -1}, "#/maxLength must be from 0 to"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems is larger than its maxItems"),
        ([], "must be a JSON schema as a dictionary"),
        ({"properties": {"a": 5}}, "#/properties/a must be an object or true"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_name(schema: Any, problem: str) -> None:
    with pytest.raises(PromptError, match=problem) as refused:
        Sampling(schema=schema)
    assert "\n" not in str(refused.value)


def test_deep_schemas_are_refused_and_large_ones_take_little_time(pico: VLM) -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"properties": {"a": deep}, "required": ["a"]}
    with pytest.raises(PromptError, match="nested deeper than 100 levels"):
        Sampling(schema=deep)
    large = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(500)}}
    form = Sampling(schema=large).constraint
    assert form and fits(pico, form.grammar, '{"p7": 1, "p499": 2}')
    codes = {"enum": [f"code {i}" for i in range(5000)]}
    form = Sampling(schema=codes).constraint
    assert form and fits(pico, form.grammar, '"code 4999"')
