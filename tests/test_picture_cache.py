"""A picture that was asked about before, by another load of the model, costs no encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm import disk_cache
from edgevlm.errors import PromptError
from edgevlm.runtimes import shelves
from edgevlm.runtimes.cache import EmbeddingCache, Shelf
from edgevlm.types import Reply

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
QUESTION = "answer en what shape is red?"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with the cache that users have."""
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE")
    return tmp_path


def ask(image: Any = SHAPES, question: str = QUESTION, **loading: Any) -> Reply:
    """An answer of pico, loaded anew."""
    with edgevlm.load(**loading) as vlm:
        return vlm.ask(question, image)


def encoded(reply: Reply) -> bool:
    assert (reply.timings.vision_ms == 0) == (reply.tokens.cached == reply.tokens.image)
    return reply.timings.vision_ms > 0


def entries() -> list[Path]:
    folder = disk_cache.pictures_folder().folder
    return sorted(folder.iterdir()) if folder.exists() else []


def test_another_load_does_not_encode_it_again() -> None:
    first, second = ask(), ask(question="answer en what shape is blue?")
    assert encoded(first) and not encoded(second)
    assert (first.text, second.text) == ("circle", "square")
    with edgevlm.load() as vlm:
        rows = vlm.image_embeddings(SHAPES)
        vlm.ask(QUESTION, SHAPES)
        (known,) = vlm.engines.cache._rows.values()
    assert np.array_equal(rows, known)


def test_image_embeddings_are_kept_and_found_as_those_of_answers_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with edgevlm.load() as vlm:
        rows = vlm.image_embeddings(SHAPES)
        assert len(entries()) == 1
        rows_before = rows.copy()
        rows[:] = 0  # The caller's own.
        assert np.array_equal(vlm.image_embeddings(SHAPES), rows_before)
    assert not encoded(ask())
    with edgevlm.load() as vlm:
        monkeypatch.setattr(vlm.engines.encoder, "features", None)
        assert np.array_equal(vlm.image_embeddings(SHAPES), rows_before)
        monkeypatch.undo()
    with edgevlm.load(cache=False) as vlm:
        assert np.array_equal(vlm.image_embeddings(SHAPES), rows_before)


def test_the_old_name_warns_and_forwards() -> None:
    with edgevlm.load() as vlm:
        with pytest.warns(DeprecationWarning, match=r"image_embeddings now; .* goes in 0\.3"):
            rows = vlm.embed_image(SHAPES)
        assert np.array_equal(rows, vlm.image_embeddings(SHAPES))


def test_another_process_does_not_encode_it_again() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "edgevlm", "ask", "-m", "pico", "--json", QUESTION]
    command += ["-i", str(SHAPES)]
    run = [subprocess.run(command, capture_output=True, text=True, env=env) for _ in range(2)]
    assert [done.returncode for done in run] == [0, 0]
    assert '"cached": 0' in run[0].stdout and '"cached": 64' in run[1].stdout
    before = [path.stat() for path in entries()]
    off = subprocess.run([*command, "--no-cache"], capture_output=True, text=True, env=env)
    assert '"cached": 0' in off.stdout and [path.stat() for path in entries()] == before


def test_the_same_pixels_in_another_file(tmp_path: Path) -> None:
    from PIL import Image

    ask()
    Image.open(SHAPES).save(tmp_path / "copy.bmp")
    assert not encoded(ask(tmp_path / "copy.bmp"))


@pytest.mark.parametrize(
    "change",
    ["pixels", "an encoder", "onnxruntime", "edgevlm and pillow", "a processor", "the plan"],
)
def test_whatever_else_the_embeddings_depend_on(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    from edgevlm.image.plan import among
    from edgevlm.runtimes import views
    from edgevlm.runtimes.llama import ggml
    from edgevlm.runtimes.vision.ort import Ort

    ask()
    image: Any = SHAPES
    if change == "pixels":
        image = np.zeros((20, 20, 3), np.uint8)
    elif change == "an encoder":
        hashes = shelves._hashes
        monkeypatch.setattr(shelves, "_hashes", lambda c: tuple(h[::-1] for h in hashes(c)))
    elif change == "onnxruntime":
        monkeypatch.setattr(Ort, "version", "9.9")
    elif change == "edgevlm and pillow":
        monkeypatch.setattr(shelves, "version", lambda name: f"9.9 of {name}")
    elif change == "a processor":
        monkeypatch.setattr(ggml, "cpu_features", lambda: ["ABACUS"])
    else:
        monkeypatch.setattr(views, "among", lambda s, n: replace(among(s, n), fit="crop"))
    assert encoded(ask(image)) and len(entries()) == 2


@pytest.mark.fault(
    "Caches",
    "a kept picture that is cut short, empty or something else",
    "computed anew and replaced",
)
@pytest.mark.parametrize("damage", ["truncated", "half-written", "foreign", "folder"])
def test_a_damaged_entry_is_computed_anew_and_replaced(damage: str) -> None:
    ask()
    (path,) = entries()
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"truncated": data[:-9], "half-written": b"", "foreign": b"PK"}[damage])
    again = ask()
    assert encoded(again) and again.text == "circle"
    if damage != "folder":
        assert path.read_bytes() == data and not encoded(ask())


def test_an_entry_of_another_shape_is_none(tmp_path: Path) -> None:
    cache = disk_cache.DiskCache(tmp_path / "x", 10_000)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    written = EmbeddingCache(Shelf(cache, "model"))
    written.put("a", rows)
    assert not cache.bytes()  # not while somebody waits
    written.keep()
    assert EmbeddingCache(Shelf(cache, "model")).get("a", (4, 4)) is None
    assert EmbeddingCache(Shelf(cache, "another")).get("a", (3, 4)) is None
    found = EmbeddingCache(Shelf(cache, "model")).get("a", (3, 4))
    assert found is not None and np.array_equal(found, rows)


def test_forget_computes_anew_and_replaces() -> None:
    ask()
    with edgevlm.load() as vlm:
        assert not encoded(vlm.ask(QUESTION, SHAPES))
        vlm.forget()
        assert encoded(vlm.ask(QUESTION, SHAPES))
        assert not encoded(vlm.ask(QUESTION, SHAPES))
    assert len(entries()) == 1 and not encoded(ask())


@pytest.mark.parametrize("how", ["cache=False", "size 0"])
def test_without_it_nothing_of_a_picture_stays(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loading: dict[str, Any] = {"cache": False} if how == "cache=False" else {}
    if how == "size 0":
        monkeypatch.setenv("EDGEVLM_CACHE_SIZE", "0")
    assert all(encoded(ask(**loading)) for _ in range(2)) and not entries()


def test_its_size_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, there in (("100KB", 1), ("10KB", 0)):
        monkeypatch.setenv("EDGEVLM_CACHE_SIZE", size)
        for value in (0, 90, 180):
            ask(np.full((20, 20, 3), value, np.uint8))
        assert len(entries()) == there  # 64 KiB each
        disk_cache.pictures_folder().clear()
    monkeypatch.setenv("EDGEVLM_CACHE_SIZE", "lots")
    with pytest.raises(PromptError, match="EDGEVLM_CACHE_SIZE 'lots' is not a size; write"):
        edgevlm.load()


@pytest.mark.fault("Caches", "a cache folder that cannot be made", "answers as without a cache")
def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "file"))
    assert [ask().text for _ in range(2)] == ["circle"] * 2


def test_an_answer_that_was_cancelled_keeps_its_picture() -> None:
    with edgevlm.load() as vlm:
        answer = vlm.stream("caption en", SHAPES)
        next(answer)
        assert not entries()
        answer.cancel()
        answer.finish()
    assert len(entries()) == 1 and not encoded(ask())
