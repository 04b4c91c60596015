"""Loading: encoder and decoder side by side, and the first picture encoded meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleCorrupt, ImageError
from edgevlm.image import read as image_read
from edgevlm.models import built_in
from edgevlm.runtimes import loading
from edgevlm.runtimes.interrupt import SideThread
from edgevlm.runtimes.loading import LoadOptions, load_bundle
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.types import Progress

SHAPES = str(Path(__file__).parent.parent / "examples" / "shapes.png")
QUESTION = "answer en what shape is red?"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that ran the encoder, after its first use on this machine."""
    edgevlm.load().close()
    names: list[str] = []
    features = OrtEncoder.features

    def noted(self: OrtEncoder, pixels: Any) -> Any:
        names.append(threading.current_thread().name)
        return features(self, pixels)

    monkeypatch.setattr(OrtEncoder, "features", noted)
    return names


def test_the_first_picture_is_encoded_before_the_decoder_stands(
    encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threading.Event()
    open_decoder = loading.open_decoder

    def waiting(*args: Any, **options: Any) -> Any:
        assert seen.wait(60)  # the picture needs no decoder
        return open_decoder(*args, **options)

    monkeypatch.setattr(loading, "open_decoder", waiting)
    tiles: list[Progress] = []

    def told(progress: Progress) -> None:
        tiles.append(progress)
        seen.set()

    with edgevlm.load(image=SHAPES, progress=told) as vlm:
        assert encoded == ["edgevlm-beside"] and [p.done for p in tiles] == [0, 1]
        reply = vlm.ask(QUESTION, SHAPES)
        assert len(encoded) == 1
        again = vlm.ask(QUESTION, SHAPES)
    with edgevlm.load() as other:
        assert reply.token_ids == other.ask(QUESTION, SHAPES).token_ids
    # The answer it was made for says what it took, and that nothing was known of it before.
    assert min(reply.timings.vision_ms, reply.timings.image_decode_ms) > 0
    assert reply.timings.projector_ms > 0 and reply.tokens.cached == 0
    assert again.timings.vision_ms == 0 and again.tokens.cached == again.tokens.image


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch, encoded: list[str]) -> None:
    read: list[str] = []
    from_name = image_read._from_name

    def noted(name: str) -> Any:
        read.append(name)
        return from_name(name)

    monkeypatch.setattr(image_read, "_from_name", noted)
    with edgevlm.load(image=[SHAPES]) as vlm:
        with vlm.chat([SHAPES]) as chat:
            assert [chat.ask(QUESTION).text for _ in range(2)] == ["circle", "circle"]
        assert len(read) == len(encoded) == 1
        vlm.ask(QUESTION, SHAPES)
        assert len(read) == 2


def test_another_picture_is_another(encoded: list[str]) -> None:
    grey = np.full((30, 30, 3), 90, np.uint8)
    with edgevlm.load(image=grey) as vlm:
        assert vlm.ask(QUESTION, SHAPES).text == "circle"
    assert len(encoded) == 2


def test_too_many_pictures_are_refused_by_the_question(encoded: list[str]) -> None:
    n = open_bundle(built_in()).manifest.image.max_pictures + 1
    with edgevlm.load(image=[SHAPES] * n) as vlm:
        assert not encoded
        with pytest.raises(edgevlm.PromptError, match=f"{n} pictures in one request"):
            vlm.ask(QUESTION, [SHAPES] * n)


def test_a_picture_that_cannot_be_read_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("open_encoder", "open_decoder"):
        monkeypatch.setattr(loading, name, never)
    with pytest.raises(ImageError, match="gone.png"):
        edgevlm.load(image=tmp_path / "gone.png")


@pytest.mark.parametrize("broken", ["open_encoder", "open_decoder"])
@pytest.mark.parametrize("marked", [True, False])
def test_an_engine_that_does_not_load_is_named(
    broken: str, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise BundleCorrupt(Path(broken), "is broken")

    monkeypatch.setattr(loading, broken, fails)
    with pytest.raises(BundleCorrupt, match=f"{broken}: is broken"):
        load_bundle(built_in(), LoadOptions(images=[SHAPES]), (lambda _: None) if marked else None)


def test_a_failure_ends_what_runs_beside_it() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert stopped.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt), SideThread(work, stopped.set):
        raise KeyboardInterrupt
    assert ended.is_set()


def test_weights_that_are_not_packed_give_the_same_bits() -> None:
    """For 8 bits, which is where the first of few pictures goes without."""
    bundle, ort = open_bundle(built_in()), Ort()
    graph, side = bundle.vision("int8"), bundle.manifest.image.size
    pixels = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    (cpu,) = (offer for offer in ort.offers() if offer.word == "cpu")
    open_session: Callable[..., Any] = ort.session
    packed, plain = (
        open_session(graph, cpu, 2, False, Path(), prepack=prepack).run(None, {"pixels": pixels})
        for prepack in (True, False)
    )
    assert np.array_equal(packed[0], plain[0])
