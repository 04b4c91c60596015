"""Search in a folder's pictures over HTTP: what is found, and what is never served."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from edgevlm.server.access import Access
from edgevlm.server.limits import Limits
from tests.serving import Served, album, data_url, serving, solid
from tests.test_server_limits import until

# One for all: each makes a context of certificates.
HTTP = httpx.Client(verify=False)
RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "album"
    solid(root / "rose.png", RED)
    solid(root / "in" / "tomato.jpg", (200, 40, 20))
    solid(root / "grass.webp", GREEN)
    solid(root / "grass copy.webp", GREEN)
    solid(root / "sea \u00e9.png", BLUE, (3000, 20))
    solid(root.parent / "elsewhere" / "secret.png", RED)
    (root / "notes.png").write_text("no picture", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pool, photos = album(tmp_path_factory.mktemp("album"), folder)
    with serving(pool, photos=photos) as found:
        until(lambda: not status(found)["indexing"])
        yield found


def status(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = HTTP.get(f"{served.base}/photos/status").json()
    return found


def post(served: Served, path: str = "search", **body: Any) -> httpx.Response:
    return HTTP.post(f"{served.base}/photos/{path}", json=body)


def paths(response: httpx.Response) -> list[str]:
    return [photo["path"] for photo in response.json()["photos"]]


def get(served: Served, id: str, size: str = "small") -> httpx.Response:
    return HTTP.get(f"{served.base}/photos/{id}/{size}")


def test_words_find_pictures_the_best_first(served: Served) -> None:
    found = post(served, text="something red").json()["photos"]
    assert [photo["path"] for photo in found[:2]] == ["rose.png", os.path.join("in", "tomato.jpg")]
    scores = [photo["score"] for photo in found]
    assert len(found) == 5 and scores == sorted(scores, reverse=True) and scores[0] > 0.9
    assert paths(post(served, text="blue", limit=1)) == ["sea \u00e9.png"]


def test_pictures_find_pictures(served: Served) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), GREEN).save(buffer, "PNG")
    assert set(paths(post(served, image=data_url(buffer.getvalue()), limit=2))) == {
        "grass.webp", "grass copy.webp"
    }  # fmt: skip
    (sea,) = post(served, text="blue", limit=1).json()["photos"]
    (again, _) = post(served, id=sea["id"], limit=2).json()["photos"]
    assert again["path"] == sea["path"] and again["score"] == pytest.approx(1, abs=1e-5)


def test_near_duplicates_are_groups(served: Served) -> None:
    found = post(served, "duplicates", threshold=0.9999).json()
    (group,) = found["groups"]
    assert found["n_groups"] == 1
    assert {photo["path"] for photo in group} == {"grass.webp", "grass copy.webp"}
    assert post(served, "duplicates", threshold="much").status_code == 400


def test_a_picture_is_drawn_anew_within_its_side(served: Served) -> None:
    (sea,) = post(served, text="blue", limit=1).json()["photos"]
    for size, width in (("small", 360), ("large", 2048)):
        for _ in range(2):  # drawn, then kept
            answer = get(served, sea["id"], size)
            assert answer.headers["content-type"] == "image/jpeg"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert Image.open(io.BytesIO(answer.content)).width == width


def test_the_status_counts_and_names_what_cannot_be_read(served: Served) -> None:
    now = status(served)
    assert (now["folder"], now["pictures"], now["n_failures"]) == ("album", 5, 1)
    assert now["failures"][0]["path"] == "notes.png"
    assert "not a picture" in now["failures"][0]["reason"]


@pytest.mark.parametrize(
    "path",
    ["../elsewhere/secret.png", "%2e%2e%2felsewhere%2fsecret.png", "rose.png", "0" * 24, "x" * 999],
)
def test_only_what_was_found_is_served(served: Served, path: str) -> None:
    answer = get(served, path)
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/json"
    assert get(served, path, "huge").status_code == 404
    assert post(served, id=path).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": 3},
        {"text": "red", "id": "x"},
        {"text": "red", "limit": 0},
        {"text": "red", "limit": 10**9},
        {"text": "red", "limit": True},
        {"image": "/etc/passwd"},
        {"image": "http://127.0.0.1/x.png"},
        {"image": "data:image/png;base64,aGVsbG8="},
        {"file": "rose.png"},
    ],
)
def test_a_search_that_is_not_one_is_refused(served: Served, body: dict[str, Any]) -> None:
    answer = post(served, **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    text = HTTP.post(f"{served.base}/photos/search", content='{"text": "red"}')
    assert text.status_code == 415  # what pages of other origins can send


def test_what_has_changed_since_is_not_served(tmp_path: Path) -> None:
    folder, secret = tmp_path / "album", solid(tmp_path / "secret.png", (220, 30, 30))
    rose = solid(folder / "rose.png", RED)
    inside = solid(folder / "in" / "tomato.png", (200, 40, 20))
    pool, photos = album(tmp_path / "kept", folder)
    with serving(pool, photos=photos) as served:
        until(lambda: not status(served)["indexing"])
        ids = {photo["path"]: photo["id"] for photo in post(served, text="red").json()["photos"]}
        rose.unlink()
        rose.symlink_to(secret)
        inside.rename(tmp_path / "tomato.png")
        for path in ("rose.png", os.path.join("in", "tomato.png")):
            answer = get(served, ids[path], "large")
            assert answer.status_code == 404 and "search again" in answer.text
        solid(folder / "leaf.png", GREEN)
        assert post(served, "update").json() == {"indexing": True}
        until(lambda: not status(served)["indexing"])
        assert sorted(paths(post(served, text="red"))) == ["leaf.png", "rose.png"]
        # A link that the index holds is one of its pictures.
        (now,) = post(served, text="red", limit=1).json()["photos"]
        assert now["id"] != ids["rose.png"] and get(served, now["id"]).status_code == 200


def test_limits_are_those_of_the_server(tmp_path: Path, folder: Path) -> None:
    limits = Limits(pixels=2000, body_bytes=10_000)
    pool, photos = album(tmp_path, folder, limits)
    with serving(pool, limits=limits, photos=photos) as served:
        until(lambda: not status(served)["indexing"])
        found = {photo["path"]: photo["id"] for photo in post(served, text="x").json()["photos"]}
        assert get(served, found["rose.png"]).status_code == 200
        answer = get(served, found["sea \u00e9.png"])
        assert answer.status_code == 413 and "3000 x 20 pixels" in answer.text
        assert post(served, text="x" * 20_000).status_code == 413


def test_the_key_is_asked_for(tmp_path: Path, folder: Path) -> None:
    pool, photos = album(tmp_path, folder)
    with serving(pool, Access(key="secret"), photos=photos) as served:
        assert HTTP.get(f"{served.base}/photos").status_code == 200  # to type it in
        for path in ("status", "x/small"):
            assert HTTP.get(f"{served.base}/photos/{path}").status_code == 401
        assert post(served, text="red").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        answer = HTTP.get(f"{served.base}/photos/status", headers=headers)
        assert answer.status_code == 200
        foreign = {**headers, "Origin": "https://evil.example"}
        assert HTTP.get(f"{served.base}/photos/status", headers=foreign).status_code == 403


def test_the_page_is_the_first_where_no_model_answers(
    served: Served, tmp_path: Path, folder: Path
) -> None:
    assert HTTP.get(served.base).headers["location"] == "/photos"
    (model,) = HTTP.get(f"{served.api}/models").json()["data"]
    assert model["edgevlm"]["embeddings"] == 3 and model["edgevlm"]["photos"] is True
    pool, photos = album(tmp_path, folder, answering=True)
    with serving(pool, photos=photos) as both:
        assert HTTP.get(both.base).status_code == 200
    with serving({}) as without:
        assert HTTP.get(f"{without.base}/photos").status_code == 404


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    pool, photos = album(tmp_path / "kept", tmp_path / "gone")
    with serving(pool, photos=photos) as served:
        until(lambda: not status(served)["indexing"])
        assert "no such folder" in status(served)["problem"]
        assert paths(post(served, text="red")) == []


def test_routes_are_counted_without_ids(served: Served) -> None:
    get(served, "abc")
    counted = HTTP.get(f"{served.base}/metrics").text
    assert 'route="/photos/{id}/{size}"' in counted and 'route="/photos/search"' in counted
    assert "abc" not in counted
