"""Answers held to a form, on models of several families."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

import edgevlm
from edgevlm.bundle import Bundle
from edgevlm.errors import PromptError
from edgevlm.export import export_bundle
from edgevlm.runtimes import fakes
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling, SamplingOptions

pytestmark = pytest.mark.usefixtures("children_inside")

PICTURE = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
SHAPE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "☆ star"]},
        "n": {"type": "integer", "minimum": 1, "maximum": 20},
        "sure": {"type": "boolean"},
    },
    "required": ["shape", "n", "sure"],
}


@pytest.fixture(scope="module", params=["pico", "paligemma", "smolvlm"])
def model(
    request: pytest.FixtureRequest,
    paligemma_bundle: Bundle,
    smolvlm_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VLM]:
    """Prefix attention with SentencePiece (PaliGemma), causal with byte-level BPE (SmolVLM)."""
    source: Path | None = None
    if request.param == "paligemma":
        source = paligemma_bundle.folder
    elif request.param == "smolvlm":
        source = tmp_path_factory.mktemp("bundles") / "smolvlm"
        export_bundle(
            smolvlm_checkpoint, source, quant="f32", vision_precision="fp32", verify=False
        )
    with edgevlm.load(source) as vlm:
        yield vlm


def test_an_answer_fits_its_schema(model: VLM) -> None:
    for options in (SamplingOptions(), SamplingOptions(temperature=2.0, seed=1, top_k=9)):
        options["schema"] = SHAPE
        reply = model.ask("describe", PICTURE, **options)
        assert reply.finish_reason == "stop"
        assert reply.parsed == json.loads(reply.text)
        assert list(reply.parsed) == ["shape", "n", "sure"]
        assert reply.parsed["shape"] in ["circle", "square", "☆ star"]
        assert 1 <= reply.parsed["n"] <= 20 and isinstance(reply.parsed["sure"], bool)


def test_an_answer_is_one_of_the_choices(model: VLM) -> None:
    choices = ["yes", "no", "日本語 🍮"]
    for seed in range(4):
        reply = model.ask("which?", PICTURE, choices=choices, temperature=3.0, seed=seed)
        assert reply.text in choices and reply.parsed == reply.text
    assert model.ask("which?", PICTURE, choices=["日本語 🍮"]).text == "日本語 🍮"


def test_greedy_takes_the_likeliest_of_the_allowed_tokens(model: VLM) -> None:
    reply = model.ask("x", PICTURE, grammar='root ::= "(" [a-f]{12} ")"', logprobs=20)
    assert reply.text[0] == "(" and len(reply.text) == 14
    decoder = model.engines.decoder
    allowed = [t for t in range(len(decoder.logits())) if set(decoder.piece(t)) <= set(b"abcdef")]
    for token in reply.logprobs[1:-1]:
        better = [t for t in token.top if t.logprob > token.logprob]
        # What is likelier is not allowed, or too long for the letters that are left.
        assert not [t for t in better if t.token_id in allowed and len(t.data) == 1]


def test_the_repetition_penalty_counts_before_the_grammar(model: VLM) -> None:
    options = SamplingOptions(grammar="root ::= [a-z]{8}", repetition_penalty=50.0)
    tokens = model.ask("x", PICTURE, **options).token_ids
    assert len({*tokens}) == len(tokens)


def test_tokens_of_the_same_seed_are_the_same(model: VLM) -> None:
    options = SamplingOptions(grammar="root ::= [a-z]{8}", temperature=2.0, seed=7)
    assert model.ask("x", PICTURE, **options).text == model.ask("x", PICTURE, **options).text


def test_an_answer_that_was_cut_says_so(model: VLM) -> None:
    reply = model.ask("describe", PICTURE, schema=SHAPE, max_tokens=2)
    assert reply.finish_reason == "length"
    with pytest.raises(PromptError, match="cut at 2 tokens and is not whole; raise max_tokens"):
        _ = reply.parsed


def test_a_free_answer_after_one_that_was_held_to_a_form(model: VLM) -> None:
    before = model.ask("x", PICTURE, max_tokens=4)
    model.ask("x", PICTURE, choices=["yes", "no"])
    assert model.ask("x", PICTURE, max_tokens=4).token_ids == before.token_ids
    with pytest.raises(PromptError, match="this answer is free text"):
        _ = before.parsed


def test_a_vocabulary_that_cannot_spell_the_answer(model: VLM) -> None:
    decoder = model.engines.decoder
    assert isinstance(decoder, LlamaDecoder)
    spoken = decoder.vocabulary.spoken
    before = spoken.copy()
    try:
        for token in np.flatnonzero(before):
            spoken[token] = b"b" not in decoder.piece(int(token))
        for temperature in (0.0, 1.0):
            with pytest.raises(PromptError, match=r"cannot go on after 'aa?': no token of this"):
                model.ask(
                    "x", PICTURE, grammar='root ::= "a"{1,2} "b"', temperature=temperature, seed=1
                )
    finally:
        spoken[:] = before
    assert model.ask("x", PICTURE, grammar='root ::= "a"{1,2} "b"').text in ("ab", "aab")


def test_text_of_other_scripts_comes_whole(model: VLM) -> None:
    for seed in range(3):
        options = SamplingOptions(
            temperature=5.0, seed=seed, schema={"minLength": 3, "maxLength": 3}
        )
        reply = model.ask("x", PICTURE, **options)
        assert "\ufffd" not in reply.text and len(reply.parsed) == 3


class Answered:
    """The part of a pydantic model that edgevlm knows."""

    def __init__(self, n: int) -> None:
        self.n = n

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"n": {"enum": [3, 5]}}, "required": ["n"]}

    @classmethod
    def model_validate(cls, value: dict[str, int]) -> "Answered":
        if value["n"] == 5:
            raise ValueError("five is\nnot right")
        return cls(**value)


def test_a_class_gives_the_schema_and_gets_the_value() -> None:
    reply = fakes.vlm('{"n": 3}').ask("x", schema=Answered)
    assert isinstance(reply.parsed, Answered) and reply.parsed.n == 3
    assert pickle.loads(pickle.dumps(reply)).parsed.n == 3
    wrong = fakes.vlm('{"n": 5}').ask("x", schema=Answered)
    with pytest.raises(PromptError, match="does not fit what was asked for: five is not right"):
        _ = wrong.parsed


def test_pydantic_models() -> None:
    shape = pydantic.create_model("Shape", name=(str, ...), n=(int | None, None))
    reply = fakes.vlm('{"name": "circle", "n": 3}').ask("x", schema=shape)
    assert (reply.parsed.name, reply.parsed.n) == ("circle", 3)


def test_a_stop_string_may_cut_an_answer_that_had_to_be_whole() -> None:
    reply = fakes.vlm('{"n": 3}').ask("x", schema=Answered, stop="3")
    with pytest.raises(PromptError, match="does not fit what was asked for"):
        _ = reply.parsed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (SamplingOptions(choices=["a"], grammar='root ::= "a"'), "choices and grammar cannot be"),
        (SamplingOptions(schema={}, choices=["a"]), "schema and choices cannot be had at once"),
        (SamplingOptions(choices=[]), "choices must be a list of one string or more"),
        (SamplingOptions(choices="abc"), "choices must be a list of one string or more"),
        (SamplingOptions(choices=["a", ""]), "choices must be strings that are not empty"),
        (SamplingOptions(choices=[" a"]), "without blanks around them"),
        (SamplingOptions(choices=["a\0b"]), "or a NUL"),
        (SamplingOptions(grammar="root = a"), "the grammar's line 1"),
        (SamplingOptions(schema="{}"), "schema must be a JSON schema as a dictionary"),
    ],
)
def test_forms_that_are_refused(options: SamplingOptions, problem: str) -> None:
    with pytest.raises(PromptError, match=problem):
        fakes.vlm().ask("x", **options)


def test_an_answer_has_room_to_be_whole() -> None:
    spec = fakes.vlm().manifest.answer
    assert Sampling().longest(spec) == Sampling(choices=("a",)).longest(spec) == spec.max_tokens
    assert Sampling(schema=SHAPE).longest(spec) == 1024
    assert Sampling(schema=SHAPE, max_tokens=5).longest(spec) == 5


def test_a_decoder_that_is_loaded_twice_answers_the_same() -> None:
    with edgevlm.load(repack="decode") as paired, edgevlm.load(repack=False) as plain:
        for options in (SamplingOptions(), SamplingOptions(temperature=1.0, seed=3)):
            options["schema"] = {"enum": ["circle", "square", 12, {"a": None}]}
            replies = [vlm.ask("x", PICTURE, **options) for vlm in (paired, plain)]
            assert replies[0].text == replies[1].text and replies[0].finish_reason == "stop"
