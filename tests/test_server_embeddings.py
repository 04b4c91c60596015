"""Embeddings, asked for by OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from edgevlm.runtimes import fakes
from tests.serving import Served, data_url, dual_pool, png, question, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pool = dual_pool(tmp_path_factory.mktemp("models"), fakes.dual(), answering=True)
    with serving(pool) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as found:
        yield found


def embed(client: openai.OpenAI, given: Any, model: str = "clip", **options: Any) -> Any:
    return client.embeddings.create(model=model, input=given, **options)


def picture(value: int) -> dict[str, Any]:
    url = data_url(png(value=value))
    return {"type": "image_url", "image_url": {"url": url}}


def test_texts_become_rows(client: openai.OpenAI) -> None:
    found = embed(client, ["red", "green and red", ""])
    rows = np.array([each.embedding for each in found.data])
    assert rows.shape == (3, 3) and [each.index for each in found.data] == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows.argmax(1)[0] == 0 and rows[1, 2] < 0.1
    assert found.usage.prompt_tokens == found.usage.total_tokens == 4
    assert (found.model, found.object, found.data[0].object) == ("clip", "list", "embedding")
    (one,) = embed(client, "red").data
    np.testing.assert_allclose(one.embedding, rows[0], atol=1e-6)


def test_both_encodings_hold_the_same_numbers(client: openai.OpenAI, served: Served) -> None:
    (packed,) = embed(client, "blue", encoding_format="base64").data  # as the server sends it
    (plain,) = embed(client, "blue", encoding_format="float").data
    raw = np.frombuffer(base64.b64decode(packed.embedding), "<f4")
    np.testing.assert_array_equal(raw, np.float32(plain.embedding))
    assert embed(client, "blue", dimensions=3, user="me").data[0].embedding == plain.embedding


def test_pictures_stand_among_texts(client: openai.OpenAI) -> None:
    many = [picture(250), "red", {"type": "text", "text": "red"}, *[picture(9)] * 9]
    rows = np.array([each.embedding for each in embed(client, many).data])
    assert rows.shape == (12, 3)
    np.testing.assert_allclose(rows[0], 3**-0.5, atol=1e-3)
    np.testing.assert_array_equal(rows[1], rows[2])


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        ([], {}, "input must be a text or a list"),
        ([[1, 2]], {}, r"input\[0\] must be a text"),
        (["a"] * 2049, {}, "more than 2048 items"),
        ("a", {"dimensions": 2}, "dimensions must be 3"),
        ("a", {"dimensions": True}, "dimensions must be a whole number"),
        ("a", {"encoding_format": "int8"}, "must be float or base64"),
        ("a", {"extra_body": {"truncate": 3}}, "'truncate' is not a parameter"),
        ("a", {"model": "vlm"}, "vlm: answers questions and embeds no texts"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], {}, "comes as a data URL"),
        ([{"type": "audio"}], {}, "use 'text' or 'image_url'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    client: openai.OpenAI, given: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        embed(client, given, **options)


def test_a_model_that_embeds_answers_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="POST /v1/embeddings asks it"):
        client.chat.completions.create(model="clip", messages=[question("x")])  # type: ignore[list-item]
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        embed(client, "a", model="nobody")


def test_damaged_pictures_are_named(client: openai.OpenAI, served: Served) -> None:
    broken = data_url(png()[:-30])
    answer = httpx.post(
        f"{served.api}/embeddings",
        json={"model": "clip", "input": [{"type": "image_url", "image_url": {"url": broken}}]},
    )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_image"
