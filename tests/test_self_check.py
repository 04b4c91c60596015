"""A machine checks an encoder before it trusts it: wrong graphs, fallbacks, what is remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm import machine
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli.waiting import stage_text
from edgevlm.errors import EngineError
from edgevlm.export import export_bundle, requantize_bundle
from edgevlm.manifest import MANIFEST, read_manifest, write_manifest
from edgevlm.models import built_in
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.self_check import PATTERNS, cosine, picture, sketch
from edgevlm.types import Placement, Progress
from tests.devices import Behaviour, Device, FakeOnnxruntime, Float

pytestmark = pytest.mark.usefixtures("children_inside")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ROWS = np.random.default_rng(0).normal(size=(1, 64, 48)).astype(np.float32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def pico() -> Bundle:
    return open_bundle(built_in())


@pytest.fixture(scope="module")
def both(paligemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with its encoder in int8 and in float32."""
    out = tmp_path_factory.mktemp("bundles") / "both"
    return export_bundle(
        paligemma_checkpoint, out, quant="f32", vision_precision=["int8", "fp32"], verify=False
    )


class Planted(FakeOnnxruntime):
    """onnxruntime whose CPU does `does` to the output of the graphs of that name; counts runs."""

    def __init__(self, graph: str, does: Callable[[Float], Float]) -> None:
        super().__init__()
        self.ran = 0
        fake, session = self, super().InferenceSession

        class Session(session):  # type: ignore[misc,valid-type]
            def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
                super().__init__(path, *args, **kwargs)
                self._wrong = Path(path).name == graph

            def run(self, *args: Any) -> list[Float]:
                fake.ran += 1
                (found,) = super().run(*args)
                return [does(found) if self._wrong else found]

        self._session = Session

    @property
    def InferenceSession(self) -> Any:
        return self._session


def negative(x: Float) -> Float:
    return -x


def place(bundle: Bundle, fake: FakeOnnxruntime, word: str = "cpu") -> Placement:
    encoder, placed = open_encoder(bundle, Wish(word, 1), Ort(fake))
    encoder.close()
    return placed


# Sketches


def test_the_picture_is_the_same_everywhere() -> None:
    pixels = picture(28)
    assert pixels.shape == (1, 3, 28, 28) and pixels.dtype == np.float32
    assert abs(pixels).max() <= 1
    digest = hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "844ba6607e6cdcb6"


def test_a_sketch_is_the_same_everywhere() -> None:
    values = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)
    assert sketch(values).shape == (5, PATTERNS)
    assert sketch(values)[:2, :3].tolist() == [[-11.0, -1.0, -21.0], [54.0, 14.0, -10.0]]
    assert sketch(ROWS).shape == (16, PATTERNS)


def test_rounding_is_near_and_noise_is_seen_at_its_size() -> None:
    noise = np.random.default_rng(1).normal(size=ROWS.shape)
    assert cosine(sketch(ROWS), sketch(ROWS.astype(np.float16))) > 0.99999
    for share in (0.01, 0.1, 0.3):
        off = 1 - cosine(sketch(ROWS), sketch(ROWS + share * noise))
        assert share**2 / 2 / 10 < off < share**2 / 2 * 10


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: np.concatenate([x[:, :-1], -x[:, -1:]], 1),  # one row
        lambda x: np.concatenate([x[..., :20], x[..., 19::-1], x[..., 40:]], 2),
        lambda x: np.roll(x, 1, 1),
        lambda x: np.roll(x, 1, 2),
        lambda x: x * np.where(np.arange(x.size).reshape(x.shape) == 77, np.nan, 1),
        lambda x: x * np.where(np.arange(x.size).reshape(x.shape) == 77, np.inf, 1),
        lambda x: x[:, :8],
        np.zeros_like,
    ],
)
def test_what_is_wrong_is_far(wrong: Callable[[Float], Float]) -> None:
    assert cosine(sketch(ROWS), sketch(wrong(ROWS))) < 0.95


# The CPU


def test_a_right_encoder_is_taken_and_not_compared_again(pico: Bundle, home: Path) -> None:
    fake = Planted("none", negative)
    placed = place(pico, fake)
    assert (placed.device, placed.precision, placed.notes) == ("cpu", "int8", ())
    assert fake.ran == 2  # the encoder and the projector, once
    (kept,) = (home / "cache" / "devices" / "first-use").iterdir()
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert 0.99 < found["cosine"] <= 1 and found["least"] == pytest.approx(0.99)
    place(pico, fake)
    assert fake.ran == 2


def test_a_wrong_precision_is_passed_over_with_the_reason(both: Bundle) -> None:
    fake = Planted("vision.onnx", negative)
    for _ in range(2):  # found, then remembered
        placed = place(both, fake)
        assert (placed.device, placed.precision) == ("cpu", "fp32")
        (note,) = placed.notes
        assert note.startswith("cpu at int8: its features differ from the bundle's (cosine -0.99")
        assert fake.ran == 4


def test_the_answer_comes_from_the_precision_that_is_right(
    both: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Planted("vision.onnx", negative)
    monkeypatch.setattr("edgevlm.runtimes.loading.Ort", lambda: Ort(fake))
    with edgevlm.load(both.folder, device="cpu") as vlm:
        assert vlm.devices.vision.precision == "fp32"
        rows = vlm.image_embeddings(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.undo()
    with edgevlm.load(both.folder, device="cpu") as vlm:
        assert vlm.devices.vision.precision == "int8"
        assert (
            np.isfinite(rows).all()
            and rows.shape == vlm.image_embeddings(np.zeros((8, 8, 3), np.uint8)).shape
        )


@pytest.mark.parametrize("graph", ["vision.onnx", "projector.onnx"])
def test_where_nothing_is_right_the_error_says_what_to_do(pico: Bundle, graph: str) -> None:
    fake = Planted(graph, negative)
    for _ in range(2):
        with pytest.raises(EngineError) as error:
            place(pico, fake, "auto")
        (line,) = str(error.value).splitlines()
        assert line.startswith("the vision encoder computes wrongly on this processor: cpu at int8")
        assert "--vision-precision fp32" in line and "onnxruntime" in line
    assert fake.ran == 2


@pytest.mark.parametrize("numbers", [np.nan, np.inf])
def test_numbers_that_are_none_are_wrong(pico: Bundle, numbers: float) -> None:
    with pytest.raises(EngineError, match="computes wrongly"):
        place(pico, Planted("vision.onnx", lambda x: x * np.float32(numbers)))


def test_a_bundle_of_an_older_format_is_not_compared(pico: Bundle) -> None:
    older = replace(pico, manifest=replace(pico.manifest, self_check=None))
    fake = Planted("vision.onnx", negative)
    assert place(older, fake).precision == "int8"
    assert fake.ran == 0


def test_another_release_or_processor_is_a_first_use_again(
    pico: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError):
        place(pico, Planted("vision.onnx", negative))
    repaired = Planted("none", negative)
    with pytest.raises(EngineError):  # the same release: remembered
        place(pico, repaired)
    monkeypatch.setattr(Planted, "__version__", "1.33.0")
    assert place(pico, repaired).precision == "int8"
    monkeypatch.setattr(machine, "processor", lambda: "another")
    with pytest.raises(EngineError):
        place(pico, Planted("vision.onnx", negative))


def test_a_home_that_keeps_nothing_costs_every_start_a_picture(pico: Bundle, home: Path) -> None:
    home.write_text("no folder", encoding="utf-8")
    fake = Planted("none", negative)
    for n in (2, 4):
        assert place(pico, fake).precision == "int8"
        assert fake.ran == n


def test_a_first_use_is_told(pico: Bundle) -> None:
    told: list[Progress] = []
    for _ in range(2):
        open_encoder(pico, Wish("cpu", 1), Ort(), told.append)[0].close()
    assert [(p.stage, p.done, p.total) for p in told] == [
        ("self-check", 0, 1),
        ("self-check", 1, 1),
    ]


def test_a_terminal_says_that_a_first_use_runs() -> None:
    text = stage_text(Progress("self-check", 0, 1, "pictures"), 0.0)
    assert text == "first use here: checking the vision encoder"


def test_providers_are_compared_with_the_same_numbers(pico: Bundle) -> None:
    wrong = Behaviour(numbers=negative)
    # Even where the CPU is wrong alike.
    with pytest.raises(EngineError, match="cuda: its features differ from the bundle's"):
        place(pico, FakeOnnxruntime({CUDA: wrong, CPU: wrong}), "cuda")
    fake = FakeOnnxruntime({CUDA: Behaviour()}, [Device(CUDA, "gpu", version="2.0")])
    assert place(pico, fake, "cuda").cosine == pytest.approx(1, abs=0.01)


# The bundle


def test_the_exporter_writes_it_and_a_bundle_without_is_of_the_older_format(
    both: Bundle, tmp_path: Path
) -> None:
    check = both.manifest.self_check
    assert check and {*check.tolerances} == {"int8", "fp32"}
    assert 128 <= len(check.features) + len(check.embeddings) <= 256
    for older in (False, True):
        written = replace(both.manifest, self_check=None) if older else both.manifest
        write_manifest(tmp_path, written)
        said = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
        assert (said["format"], "self_check" in said) == ((2, False) if older else (4, True))
        assert read_manifest(tmp_path) == written


def test_requantized_encoders_are_held_to_the_same_numbers(
    paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    check = paligemma_bundle.manifest.self_check
    made = requantize_bundle(paligemma_bundle.folder, tmp_path / "a", vision_precision="int8")
    assert check and made.manifest.self_check
    assert dataclasses.replace(made.manifest.self_check, tolerances={}) == replace(
        check, tolerances={}
    )
    assert made.manifest.self_check.tolerances["int8"] >= 0.01
    assert place(made, FakeOnnxruntime()).precision == "int8"
