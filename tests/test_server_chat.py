"""Chat completions, asked by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.image import read_image
from edgevlm.runtimes import fakes
from tests.serving import Served, data_url, png, question, serving

EXAMPLES = Path(__file__).parent.parent / "examples"
SHAPES = (EXAMPLES / "shapes.png").read_bytes()
BOX = "<loc0000><loc0000><loc0512><loc0512> circle"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    models = {
        "pico": lambda: edgevlm.load(threads=1),
        "fake": lambda: fakes.vlm(BOX),
        "talker": lambda: fakes.vlm(["one", "two"], conversational=True, system=True),
    }
    with serving(models) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as found:
        yield found


def ask(client: openai.OpenAI, *messages: Any, model: str = "pico", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[*messages], **options)


def test_a_picture_is_described(client: openai.OpenAI) -> None:
    found = ask(client, question("answer en what shape is red?", SHAPES))
    choice = found.choices[0]
    assert (choice.message.content, choice.message.role) == ("circle", "assistant")
    assert (choice.finish_reason, choice.logprobs, choice.index) == ("stop", None, 0)
    assert found.usage.prompt_tokens > 64
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert (found.model, found.object) == ("pico", "chat.completion")
    extras = found.edgevlm
    assert extras["tokens"]["image"] == 64 and extras["timings"]["total_ms"] > 0


def test_a_streamed_answer_is_the_same(client: openai.OpenAI) -> None:
    message = question("caption en", SHAPES)
    whole = ask(client, message).choices[0].message.content
    chunks = list(ask(client, message, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert len(chunks) > 5 and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-2].edgevlm["timings"]["first_token_ms"] > 0


def test_without_include_usage_the_last_chunk_has_a_choice(client: openai.OpenAI) -> None:
    chunks = list(ask(client, question("x"), model="fake", stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].edgevlm["boxes"] == []
    assert all(c.usage is None for c in chunks)


def test_boxes_are_in_pixels_of_the_picture(client: openai.OpenAI) -> None:
    found = ask(client, question("detect circle", png(80, 60)), model="fake")
    assert found.choices[0].message.content == BOX
    (box,) = found.edgevlm["boxes"]
    assert box["mask"] is None
    assert (box["label"], round(box["x1"]), round(box["y1"])) == ("circle", 40, 30)


class Halves:
    """A mask decoder whose masks are the upper half of every box."""

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        square = np.ones((len(codes), 64, 64), np.float32)
        square[:, 32:] = -1
        return square

    def close(self) -> None:
        pass


def test_masks_are_pictures_of_the_same_size() -> None:
    vlm = fakes.vlm(f"<loc0000><loc0000><loc1023><loc0512>{'<seg001>' * 16} cat")
    vlm.engines = replace(vlm.engines, masks=Halves())
    with (
        serving({"fake": lambda: vlm}) as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
    ):
        (box,) = ask(client, question("segment cat", png(80, 60)), model="fake").edgevlm["boxes"]
    mask = read_image(box["mask"])
    assert mask.shape == (60, 80, 3) and box["label"] == "cat"
    assert mask[:28, :38].min() == 255 and not mask[32:].any() and not mask[:, 42:].any()


def test_several_pictures_in_one_question(client: openai.OpenAI) -> None:
    found = ask(client, question("x", png(), png(value=10)), model="fake")
    assert found.edgevlm["tokens"]["image"] == 8
    with pytest.raises(openai.BadRequestError, match="3 pictures in one request"):
        ask(client, question("x", *[png(value=i) for i in range(3)]), model="fake")


def test_a_conversation_with_a_picture_is_told_what_was_said(client: openai.OpenAI) -> None:
    first = ask(client, question("a?", png()), model="talker")
    said = first.choices[0].message
    assert said.content == "one"
    again = ask(client, question("a?", png()), said, question("b?"), model="talker")
    assert again.choices[0].message.content == "two"
    assert again.edgevlm["tokens"]["text"] > first.edgevlm["tokens"]["text"]


def test_an_answer_is_cut_at_its_longest(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        found = ask(client, question("x"), model="fake", **{name: 3})
        assert found.choices[0].finish_reason == "length"
        assert found.choices[0].message.content == BOX[:3] and found.usage.completion_tokens == 3


def test_stops_end_an_answer(client: openai.OpenAI) -> None:
    found = ask(client, question("x"), model="fake", stop=["ci", "never"])
    assert found.choices[0].message.content == BOX.partition("ci")[0]
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_draws_the_same_again(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        message = question("caption en", SHAPES)
        found = ask(client, message, temperature=20, top_p=0.99, seed=seed, max_tokens=12)
        return str(found.choices[0].message.content)

    assert drawn(7) == drawn(7) == drawn(7 + 2**32 - 1)
    assert len({drawn(seed) for seed in (1, 2, 3, -1)}) > 1


class Shape(pydantic.BaseModel):
    shape: Literal["circle", "square", "star"]


def test_an_answer_fits_a_schema(client: openai.OpenAI) -> None:
    message: Any = question("answer en what shape is red?", SHAPES)
    parsed = client.chat.completions.parse(model="pico", messages=[message], response_format=Shape)
    assert isinstance(parsed.choices[0].message.parsed, Shape)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, [2], "x"]}}}
    drawn = [ask(client, message, response_format=form, temperature=5, seed=i) for i in range(8)]
    values = {json.dumps(json.loads(d.choices[0].message.content)) for d in drawn}
    assert len(values) > 1 and values <= {"1", "[2]", '"x"'}
    streamed = ask(client, message, response_format={"type": "json_object"}, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert isinstance(json.loads(text), dict)


def test_schemas_that_cannot_be_followed_are_refused(client: openai.OpenAI) -> None:
    for schema in ({"type": "object", "not": {}}, {"type": "colour"}, {"$ref": "http://x/y"}):
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, question("x"), response_format=form)
        assert caught.value.param == "response_format", caught.value.message


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_read_by_models_that_know_such(
    role: str, client: openai.OpenAI
) -> None:
    system = {"role": role, "content": "be brief"}
    alone = ask(client, question("what?"), model="talker").usage.prompt_tokens
    found = ask(client, system, question("what?"), model="talker")
    assert found.usage.prompt_tokens == alone + len("be brief|")
    empty = ask(client, {"role": role, "content": " "}, question("what?"), model="talker")
    assert empty.usage.prompt_tokens == alone
    with pytest.raises(openai.BadRequestError, match="only the first message may have"):
        ask(client, question("what?"), system, model="talker")


def test_log_probabilities_of_tokens(client: openai.OpenAI) -> None:
    message = question("caption en", SHAPES)
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    whole = ask(client, message, **wanted).choices[0]
    tokens = whole.logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text.strip() == whole.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert tokens[0].token == tokens[0].top_logprobs[0].token
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob
    chunks = list(ask(client, message, stream=True, **wanted))
    found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t for likely in found for t in likely.content] == tokens
    alone = ask(client, message, logprobs=True).choices[0].logprobs.content
    assert [t.logprob for t in alone] == [t.logprob for t in tokens]
    assert all(t.top_logprobs == [] for t in alone)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [{"role": "system", "content": "be brief"}, question("x")],
            "fake: its prompt template has no system message",
        ),
        ([{"role": "assistant", "content": "x"}], "the role 'assistant' where 'user' must stand"),
        ([question("x"), {"role": "assistant", "content": "y"}], "last message must be the user's"),
        ([question("x"), {"role": "tool", "content": "y", "tool_call_id": "1"}], "role 'tool'"),
        ([question("x" * 600)], "the model's context has 512"),
        ([question("x", b"no picture")], "not a picture"),
        ([question("x", SHAPES[: len(SHAPES) // 2])], "damaged or truncated"),
        ([question("a\0b")], "NUL character"),
    ],
)
def test_messages_that_the_model_cannot_answer(
    client: openai.OpenAI, messages: Any, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        ask(client, *messages, model="fake")
    assert caught.value.type == "invalid_request_error"
    assert str(caught.value.param).startswith("messages")
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, *messages, model="fake", stream=True)


@pytest.mark.parametrize(
    "address",
    ["/etc/passwd", "file:///etc/passwd", "examples/shapes.png", "~/x.png", "ftp://x/y.png", ""],
)
def test_files_of_the_server_are_never_read(client: openai.OpenAI, address: str) -> None:
    part = {"type": "image_url", "image_url": {"url": address}}
    with pytest.raises(openai.BadRequestError, match="comes as a data URL") as caught:
        ask(client, {"role": "user", "content": [part]}, model="fake")
    assert caught.value.code == "invalid_image_url"


def test_urls_are_fetched_only_where_that_was_allowed(client: openai.OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    with pytest.raises(openai.BadRequestError, match="--allow-image-urls"):
        ask(client, {"role": "user", "content": [part]}, model="fake")


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist here") as caught:
        ask(client, question("x"), model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pico", "fake", "talker"]
    found: Any = client.models.retrieve("pico")
    assert (found.id, found.object, found.owned_by) == ("pico", "model", "edgevlm")
    assert found.edgevlm["tasks"]["caption"] == "caption {language}"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/none")


def test_a_picture_may_come_from_the_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.server import pictures
    from edgevlm.server.limits import Limits

    asked: list[tuple[str, dict[str, Any]]] = []

    def download(url: str, **limits: Any) -> tuple[bytes, str]:
        asked.append((url, limits))
        return png(), url

    monkeypatch.setattr(pictures, "download_public", download)
    limits = Limits(image_urls=True, body_bytes=1000, upload_seconds=9)
    with (
        serving({"fake": lambda: fakes.vlm("yes")}, limits=limits) as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
    ):
        part = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
        found = ask(client, {"role": "user", "content": [part]}, model="fake")
        assert found.choices[0].message.content == "yes"
        assert asked == [("https://example.com/x.png", {"max_bytes": 1000, "seconds": 9})]


def test_a_defect_is_said_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    vlm = fakes.vlm("yes")
    with (
        serving({"fake": lambda: vlm}) as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(vlm.engines.decoder, "step", lambda _: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            ask(client, question("x"), model="fake")
        with pytest.raises(openai.APIError, match="its log says why"):
            list(ask(client, question("x"), model="fake", stream=True))
        assert "ZeroDivisionError" in caplog.text
        patch.undo()
        assert ask(client, question("x"), model="fake").choices[0].message.content == "yes"


def test_data_urls_are_not_shown_in_errors(client: openai.OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(b"secret" * 99)}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, {"role": "user", "content": [part]}, model="fake")
    assert len(caught.value.message) < 300
