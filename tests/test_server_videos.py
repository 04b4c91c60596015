"""Videos over HTTP: what is answered, and what is refused by which status."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

import edgevlm
from edgevlm.export import export_bundle
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.server import videos
from edgevlm.server.limits import Limits
from edgevlm.server.pool import Pool
from edgevlm.video import Video, Watch
from tests.checkpoints.smolvlm import write_smolvlm
from tests.serving import PLENTY, Served, png, serving
from tests.test_server_limits import CHAT, PATIENCE_S, until
from tests.test_video import SAMPLING, write_video

pytest.importorskip("av", reason='videos need pip install "edgevlm[video]"')
pytestmark = pytest.mark.usefixtures("children_inside")


def film_url(data: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **more}}


def about(*parts: dict[str, Any], text: str = "what happens?") -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.5 seconds of 96 x 64 pixels."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 25)


@pytest.fixture(scope="module")
def url(clip: Path) -> str:
    return film_url(clip.read_bytes())


def shown(**options: Any) -> VLM:
    """A fake model that is shown videos, two frames a second and six at most."""
    return fakes.vlm("it moves", films=True, conversational=True, later_pictures=True, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    models = {
        "film": shown,
        "still": lambda: fakes.vlm("no"),
        "small": lambda: shown(context_length=40),
    }
    with serving(models) as found:
        yield found


def post(served: Served, message: dict[str, Any], model: str = "film") -> httpx.Response:
    body = {"model": model, "messages": [message]}
    return httpx.post(served.base + CHAT, json=body, timeout=PATIENCE_S)


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, whose message is one line."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "\n" not in error["message"] and len(error["message"]) < 500
    return error


# Answers


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film")
    source = write_smolvlm(
        folder / "smolvlm2", model_type="smolvlm", processor={"video_sampling": SAMPLING}
    )
    out = folder / "out"
    return export_bundle(source, out, quant="f32", vision_precision="fp32", verify=False).folder


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_asks_about_a_video_and_goes_on(
    bundle: Path, clip: Path, url: str, stream: bool
) -> None:
    with edgevlm.load(bundle, cache=False) as vlm:
        first = vlm.ask("what happens?", vlm.read_video(clip, 1.3), max_tokens=4)
        message: Any = {
            "role": "user",
            "content": [
                {"type": "video", "video": vlm.read_video(clip, 1.3)},
                {"type": "text", "text": "what happens?"},
            ],
        }
        said: list[Any] = [message, {"role": "assistant", "content": first.text}]
        second = vlm.ask([*said, {"role": "user", "content": "and then?"}], max_tokens=4)
    with serving({"m": lambda: edgevlm.load(bundle, cache=False)}) as served:
        client = openai.OpenAI(base_url=served.api, api_key="none", max_retries=0)
        sent: list[Any] = [about(part(url, fps=1.3))]
        for reply in (first, second):
            given: dict[str, Any] = {"model": "m", "messages": sent, "max_tokens": 4}
            if stream:
                chunks = client.chat.completions.create(**given, stream=True)
                text = "".join(c.choices[0].delta.content or "" for c in chunks)
            else:
                answer = client.chat.completions.create(**given)
                text = answer.choices[0].message.content
                usage = answer.usage
                assert usage.prompt_tokens == reply.tokens.prompt
                # The frames are encoded once.
                assert usage.prompt_tokens_details.cached_tokens >= (
                    reply.tokens.image if reply is second else 0
                )
            assert text == reply.text
            sent += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": "and then?"},
            ]


def test_frames_a_second_stand_in_either_place(served: Served, url: str) -> None:
    counts = []
    for one in (part(url), part(url, fps=1.3), {**part(url), "fps": 1.3}, part(url, fps=None)):
        found = post(served, about(one)).json()
        counts.append(found["edgevlm"]["tokens"]["tiles"])
    assert counts == [5, 3, 3, 5]


def test_pictures_and_videos_come_together(served: Served, url: str) -> None:
    picture = base64.b64encode(png()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    found = post(served, about(part(url), image, part(url)))
    assert found.status_code == 200 and found.json()["edgevlm"]["tokens"]["tiles"] == 11


def test_the_list_of_models_says_who_is_shown_videos(served: Served, bundle: Path) -> None:
    data = httpx.get(f"{served.api}/models").json()["data"]
    # Manifests of all are pico's here.
    assert [one["edgevlm"]["videos"] for one in data] == [False] * 3
    pool = Pool(lambda: {"m": bundle}, edgevlm.load, budget=PLENTY, idle_s=None)
    with serving(pool) as own:
        (one,) = httpx.get(f"{own.api}/models").json()["data"]
        assert one["edgevlm"]["videos"] is True


# Refusals


def damaged(clip: Path) -> dict[str, bytes]:
    data = clip.read_bytes()
    return {
        "a broken one": data[: len(data) // 2],
        "one whose middle is gone": data[:100] + bytes(len(data) - 100),
        "nothing": b"",
        "a text": b"no film" * 100,
        "a picture": png(),
        "a playlist": f"ffconcat version 1.0\nfile {clip}\n".encode(),
    }


DAMAGED = (
    "a broken one",
    "one whose middle is gone",
    "nothing",
    "a text",
    "a picture",
    "a playlist",
)


@pytest.mark.fault("Server", "a video that is damaged, empty or something else", "400, in one line")
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_video_is_refused(name: str, served: Served, clip: Path) -> None:
    error = refused(post(served, about(part(film_url(damaged(clip)[name])))))
    assert error["code"] == "invalid_video"
    assert error["param"] == "messages[0].content[0].video_url.url"
    assert "the video of" in error["message"]


def test_models_without_videos_say_what_the_command_says(served: Served, url: str) -> None:
    error = refused(post(served, about(part(url)), "still"))
    with fakes.vlm("no") as vlm, pytest.raises(edgevlm.errors.PromptError) as raised:
        vlm.read_video("clip.mp4")
    assert error["message"] == str(raised.value) and "not trained on videos" in error["message"]


def test_a_video_that_does_not_fit_names_what_would(served: Served, url: str) -> None:
    error = refused(post(served, about(part(url), text="x" * 12), "small"))
    assert error["code"] == "context_length_exceeded" and "--fps" in error["message"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"type": "video_url"}, "must be an object with a url"),
        (part("clip.mp4"), "a video comes as a data URL, data:video/mp4;base64,..."),
        (part("file:///etc/passwd"), "a video comes as a data URL"),
        (part("https://example.com/clip.mp4"), "does not fetch videos from URLs"),
        (part("data:video/mp4;base64,!"), "valid base64"),
        (part("data:x", fps=0), "fps is 0; a number above 0"),
        (part("data:x", fps="2"), "fps is '2'; a number above 0"),
        (part("data:x", fps=True), "fps is True"),
        ({**part("data:x", fps=1), "fps": 1}, "beside video_url, too"),
        (part("data:x", detail="low"), "has 'detail', which is not known here"),
        ({"type": "video", "video": ["data:x"]}, "use 'text', 'image_url' or 'video_url'"),
    ],
)
def test_parts_that_are_not_known(wrong: dict[str, Any], says: str, served: Served) -> None:
    assert says in refused(post(served, about(wrong)))["message"]


def test_videos_are_not_embedded(served: Served, url: str) -> None:
    body = {"model": "film", "input": [part(url)]}
    response = httpx.post(f"{served.api}/embeddings", json=body)
    assert "use 'text' or 'image_url'" in refused(response)["message"]


# Limits


def limited(limits: Limits, message: dict[str, Any]) -> httpx.Response:
    with serving({"film": shown}, limits=limits) as served:
        return post(served, message)


def test_addresses_are_those_of_the_internet_alone(url: str) -> None:
    for address in ("http://127.0.0.1:1/clip.mp4", "http://[::1]/clip.mp4"):
        error = refused(limited(Limits(image_urls=True), about(part(address))))
        assert "not a public one" in error["message"] and error["code"] == "invalid_video"


def test_videos_are_counted_with_pictures(url: str) -> None:
    error = refused(limited(Limits(pictures=1), about(part(url), part(url))))
    assert error["code"] == "too_many_images"


@pytest.mark.fault(
    "Server", "a video with frames that are too large", "413, before they are decoded"
)
def test_large_frames_are_refused(url: str) -> None:
    error = refused(limited(Limits(pixels=96 * 64 - 1), about(part(url))), 413)
    assert error["code"] == "video_too_large" and "96 x 64" in error["message"]


def test_a_body_is_too_large_with_its_video(url: str) -> None:
    refused(limited(Limits(body_bytes=1000), about(part(url))), 413)


@pytest.mark.fault("Server", "a video that takes long to read", "413 after a minute")
def test_a_video_that_takes_long_is_given_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    clock = SimpleNamespace(monotonic=itertools.count(0, 25).__next__)
    monkeypatch.setattr(videos, "time", clock)
    error = refused(limited(Limits(), about(part(url))), 413)
    assert "within 60 seconds" in error["message"] and error["code"] == "video_too_large"


@pytest.mark.fault(
    "Server", "a client hangs up while its video is read", "reading ends, others go on"
)
def test_reading_ends_when_its_client_hangs_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    entered, ended = threading.Event(), threading.Event()

    def forever(*given: Any) -> Video:
        watch = given[-1]
        assert isinstance(watch, Watch)
        entered.set()
        try:
            while True:
                watch.frame()
        finally:
            ended.set()

    with serving({"film": shown}) as served:
        with monkeypatch.context() as patched:
            patched.setattr(videos, "read_video", forever)
            connection = http.client.HTTPConnection(served.base.removeprefix("http://"))
            text = json.dumps({"model": "film", "messages": [about(part(url))]})
            connection.request("POST", CHAT, text, {"Content-Type": "application/json"})
            assert entered.wait(PATIENCE_S)
            connection.close()
            assert ended.wait(PATIENCE_S)
            until(lambda: served.server.requests.n_running == 0)
        assert post(served, about(part(url))).status_code == 200


def test_a_server_without_pyav_says_so(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    error = refused(limited(Limits(), about(part(url))))
    assert error["code"] == "videos_not_available" and "PyAV" in error["message"]
