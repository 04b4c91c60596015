"""Limits: what is too much, what takes too long, who hung up, and the end of the server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx
import openai
import pytest

from edgevlm.errors import EdgeVLMError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.server.limits import Limits
from edgevlm.server.listening import listen, url
from tests.serving import Served, gated, png, question, serving

CHAT = "/v1/chat/completions"
PATIENCE_S = 60


def body(model: str = "fake", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [question("x", png())], **more}


def until(true: Callable[[], bool]) -> None:
    """Waits for what another thread is about to do."""
    tick = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come")


def over(served: Served, vlm: VLM) -> bool:
    """True once the running answer was told to end, or has ended."""
    holder = vlm._turns._holder
    return served.server.requests.n_running == 0 or bool(holder and holder.cancelled.is_set())


def hang_up(served: Served, ready: Callable[[], bool], **more: Any) -> None:
    """Asks, waits until it is `ready`, and closes the connection."""
    connection = http.client.HTTPConnection(served.base.removeprefix("http://"))
    text = json.dumps(body(**more))
    connection.request("POST", CHAT, text, {"Content-Type": "application/json"})
    until(ready)
    if more.get("stream"):
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        response.close()
    connection.close()


@pytest.mark.fault("Server", "a client hangs up", "its answer ends")
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_hangs_up(stream: bool) -> None:
    vlm, gate = gated("a long answer that nobody hears")
    with serving({"fake": lambda: vlm}) as served:
        hang_up(served, gate.entered.is_set, stream=stream)
        until(lambda: over(served, vlm))
        gate.open.set()
        until(lambda: served.server.requests.n_running == 0)
        assert gate.steps <= 2
        assert httpx.post(served.base + CHAT, json=body()).status_code == 200


@pytest.mark.fault("Server", "a client hangs up while it waits", "its place in the queue is free")
def test_a_request_that_waits_ends_when_its_client_hangs_up() -> None:
    vlm, gate = gated()
    read = gate.prefills
    with serving({"fake": lambda: vlm}) as served, ThreadPoolExecutor() as threads:
        first = threads.submit(httpx.post, served.base + CHAT, json=body(), timeout=PATIENCE_S)
        assert gate.entered.wait(PATIENCE_S)
        hang_up(served, lambda: served.server.requests.n_running == 2)
        until(lambda: served.server.requests.n_running == 1)
        gate.open.set()
        assert first.result().status_code == 200
        assert len(read) == 1  # the engine was never asked


@pytest.mark.fault("Server", "more requests than fit", "429 with Retry-After")
def test_more_requests_than_fit_are_told_when_to_come_back() -> None:
    vlm, gate = gated("yes")
    limits = Limits(requests=3)
    with serving({"fake": lambda: vlm}, limits=limits) as served, ThreadPoolExecutor() as threads:
        client = openai.OpenAI(base_url=served.api, api_key="none", max_retries=0)

        def ask() -> Any:
            return client.chat.completions.create(model="fake", messages=[question("x")])  # type: ignore[list-item]

        running = [threads.submit(ask) for _ in range(3)]
        until(lambda: served.server.requests.n_running == 3)
        with pytest.raises(openai.RateLimitError, match="already has 3 requests") as caught:
            ask()
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "edgevlm_queue_length 3.0" in httpx.get(f"{served.base}/metrics").text
        gate.open.set()
        assert [f.result().choices[0].message.content for f in running] == ["yes"] * 3
        assert ask().choices[0].message.content == "yes"
        client.close()


@pytest.mark.fault("Server", "an answer that takes too long", "ends, and says so")
def test_an_answer_that_takes_too_long() -> None:
    vlm, gate = gated("yes")
    with serving({"fake": lambda: vlm}, limits=Limits(seconds=0.2)) as served:
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(httpx.post, served.base + CHAT, json=body(), timeout=PATIENCE_S)
            assert gate.entered.wait(PATIENCE_S)
            until(lambda: over(served, vlm))
            gate.open.set()
            assert asked.result().status_code == 503
            assert asked.result().json()["error"]["code"] == "timeout"


@pytest.mark.fault("Server", "a body that is too large", "413, before it is read")
@pytest.mark.parametrize("stated", [True, False])
def test_large_bodies_are_refused(stated: bool) -> None:
    limits = Limits(body_bytes=100_000)
    with serving({"fake": lambda: fakes.vlm("yes")}, limits=limits) as served:
        data = b" " * 150_000
        content = data if stated else iter([data[:75_000], data[75_000:]])
        headers = {"Content-Type": "application/json"}
        large = httpx.post(served.base + CHAT, content=content, headers=headers)
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        assert httpx.post(served.base + CHAT, json=body()).status_code == 200


def test_who_asks_before_sending_is_told_at_once() -> None:
    with serving({"fake": lambda: fakes.vlm("yes")}, limits=Limits(body_bytes=1000)) as served:
        host, port = served.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE_S) as asking:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            asking.sendall(f"{head}Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n".encode())
            assert asking.recv(20).startswith(b"HTTP/1.1 413")


@pytest.mark.fault("Server", "a body that does not come", "408")
def test_bodies_that_do_not_come() -> None:
    limits = Limits(upload_seconds=0.05)
    with serving({"fake": lambda: fakes.vlm("yes")}, limits=limits) as served:
        host, port = served.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
            until(lambda: served.server.requests.n_running == 0)
            slow.shutdown(socket.SHUT_WR)
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        until(lambda: served.server.requests.n_running == 0)
        assert httpx.post(served.base + CHAT, json=body()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_gives_running_answers_a_short_time(stream: bool) -> None:
    """One ends by itself in that time; one that does not is told."""
    vlm, gate = gated("yes")
    with serving({"fake": lambda: vlm}, grace_s=0.2) as served, ThreadPoolExecutor() as threads:
        asked = threads.submit(
            httpx.post, served.base + CHAT, json=body(stream=stream), timeout=PATIENCE_S
        )
        assert gate.entered.wait(PATIENCE_S)
        served.runner.should_exit = True
        until(lambda: over(served, vlm))
        gate.open.set()
        wait([asked])
        if stream:
            assert "the server is ending" in asked.result().text
            assert "[DONE]" not in asked.result().text
        else:
            assert asked.result().status_code == 503
            assert asked.result().json()["error"]["code"] == "server_ending"


def test_an_answer_that_ends_in_time_is_whole() -> None:
    vlm, gate = gated("yes")
    with serving({"fake": lambda: vlm}, grace_s=PATIENCE_S) as served, ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, served.base + CHAT, json=body(), timeout=PATIENCE_S)
        assert gate.entered.wait(PATIENCE_S)
        served.runner.should_exit = True
        until(lambda: served.server.requests.ending)
        gate.open.set()
        assert asked.result().json()["choices"][0]["message"]["content"] == "yes"


def test_metrics_count_what_was_asked() -> None:
    with serving({"fake": lambda: fakes.vlm("yes")}) as served:
        assert httpx.post(served.base + CHAT, json=body()).status_code == 200
        assert httpx.post(served.base + CHAT, json=body(n=2)).status_code == 400
        assert httpx.get(f"{served.base}/v1/models/fake").status_code == 200
        assert httpx.get(f"{served.base}/made/up").status_code == 404
        found = httpx.get(f"{served.base}/metrics")
        assert found.headers["content-type"].startswith("text/plain; version=")
        lines = dict(line.rsplit(" ", 1) for line in found.text.splitlines() if line[0] != "#")
        requests = {key: n for key, n in lines.items() if key.startswith("edgevlm_requests_total")}
        assert requests == {
            f'edgevlm_requests_total{{code="{code}",route="{route}"}}': "1.0"
            for code, route in (
                (200, CHAT), (400, CHAT), (200, "/v1/models/{id}"), (404, "other"),
            )
        }  # fmt: skip
        assert lines['edgevlm_tokens_total{kind="generated",model="fake"}'] == "3.0"
        assert lines['edgevlm_first_token_seconds_count{model="fake"}'] == "1.0"
        assert lines['edgevlm_stage_seconds_count{model="fake",stage="prefill"}'] == "1.0"
        assert (lines["edgevlm_queue_length"], lines["edgevlm_models_loaded"]) == ("0.0", "1.0")


def test_health_says_that_the_server_is_there() -> None:
    with serving({"fake": lambda: fakes.vlm("yes")}) as served:
        assert httpx.get(f"{served.base}/health").json()["status"] == "ok"
        served.server.requests.ending = True
        assert httpx.get(f"{served.base}/health").status_code == 503
        assert httpx.post(served.base + CHAT, json=body()).status_code == 503


@pytest.mark.fault("Server", "a port that is taken", "one line, exit code 1")
def test_ports_that_are_taken_are_one_line() -> None:
    with listen("127.0.0.1", 0) as made:
        port = made.getsockname()[1]
        assert url(made) == f"http://127.0.0.1:{port}"
        with pytest.raises(EdgeVLMError, match=rf"cannot listen on 127.0.0.1 port {port} \(Addr"):
            listen("127.0.0.1", port)
    with pytest.raises(EdgeVLMError, match="cannot listen on no.such.host.invalid"):
        listen("no.such.host.invalid", 0)
