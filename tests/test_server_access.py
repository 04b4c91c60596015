"""Keys, hosts, origins: who is let in."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from edgevlm.runtimes import fakes
from edgevlm.server.access import Access
from tests.serving import Served, question, serving

OURS = {"host": "127.0.0.1:8000"}
CHAT = "/v1/chat/completions"


def code(access: Access, path: str = CHAT, method: str = "POST", **headers: str) -> int:
    named = {key.replace("_", "-"): value for key, value in {**OURS, **headers}.items()}
    refusal = access.refusal(method, path, named)
    return refusal.status if refusal else 200


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:1", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5:80",
     "box.lan", "box.lan:8000"],
)  # fmt: skip
def test_hosts_that_are_ours(host: str) -> None:
    assert code(Access(hosts=("box.lan",)), host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "user@localhost",
     "localhost/", "[::1", "localhost:x", "127.0.0.1:8000@evil.example", "box.lan"],
)  # fmt: skip
def test_hosts_that_are_not(host: str) -> None:
    assert code(Access(), host=host) == 403


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": "http://127.0.0.1:8000"}, True),
        ({"origin": "https://127.0.0.1:8000"}, True),
        ({"origin": "https://app.example"}, True),
        ({"origin": "http://127.0.0.1:9000"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://app.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://[:"}, False),
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "none"}, True),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"}, False),
    ],
)
def test_origins(headers: dict[str, str], allowed: bool) -> None:
    access = Access(origins=("https://app.example",))
    assert code(access, **headers) == (200 if allowed else 403)


def test_a_link_on_another_page_may_lead_to_ours_and_no_further() -> None:
    led = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert code(Access(), "/", "GET", **led) == 200
    assert code(Access(), "/", "POST", **led) == 403
    assert code(Access(), "/v1/models", "GET", **led) == 403


@pytest.mark.parametrize(
    ("sent", "right"),
    [
        ("Bearer sécret", True),
        ("bearer sécret", True),
        ("Bearer sécre", False),
        ("Bearer sécret2", False),
        ("Basic sécret", False),
        ("sécret", False),
        ("Bearer", False),
        ("", False),
    ],
)
def test_keys(sent: str, right: bool) -> None:
    access = Access(key="sécret")
    latin = sent.encode().decode("latin-1")
    assert code(access, authorization=latin) == (200 if right else 401)
    assert code(access, "/", "GET") == code(access, "/health", "GET") == 200
    for path in ("/metrics", "/v1/models", "/docs", "//", "/health/"):
        assert code(access, path, "GET", authorization=latin) == (200 if right else 401)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    access = Access(key="secret", origins=("https://app.example",))
    with serving({"fake": lambda: fakes.vlm("yes")}, access) as found:
        yield found


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with openai.OpenAI(base_url=served.api, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the key is wrong") as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        right = client.with_options(api_key="secret").chat.completions.create(
            model="fake",
            messages=[question("x")],  # type: ignore[list-item]
        )
        assert right.choices[0].message.content == "yes"


def test_pages_that_were_allowed_may_ask_and_read_even_refusals(served: Served) -> None:
    page = {"Origin": "https://app.example"}
    preflight = {**page, "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    answer = httpx.options(served.base + CHAT, headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == page["Origin"]
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    refusal = httpx.post(served.base + CHAT, headers=page, json={})
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == page["Origin"]


def test_other_pages_may_not(served: Served) -> None:
    page = {"Origin": "https://evil.example", "Authorization": "Bearer secret"}
    preflight = {**page, "Access-Control-Request-Method": "POST"}
    assert httpx.options(served.base + CHAT, headers=preflight).status_code >= 400
    refusal = httpx.post(served.base + CHAT, headers=page, json={})
    assert refusal.status_code == 403
    assert "access-control-allow-origin" not in refusal.headers


def test_bodies_that_pages_may_send_unasked_are_not_read(served: Served) -> None:
    headers = {"Authorization": "Bearer secret", "Content-Type": "text/plain"}
    refusal = httpx.post(served.base + CHAT, headers=headers, content=b"{}")
    assert refusal.status_code == 415


def test_paths_and_methods_that_nobody_has(served: Served) -> None:
    headers = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{served.base}/nope", headers=headers).json()["error"]["message"] == (
        "no such path: '/nope'"
    )
    wrong = httpx.get(served.base + CHAT, headers=headers)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
