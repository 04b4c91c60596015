"""DualEncoder and its commands, on tiny models with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import DualEncoder, cli
from edgevlm.bundle import open_bundle
from edgevlm.errors import EngineMissing, ImageError, ModelClosed, PromptError
from edgevlm.export import export_bundle
from edgevlm.hub.upload import card
from edgevlm.texts import cleaned
from tests.checkpoints.dual import write_clip, write_siglip

Run = Callable[..., tuple[Any, str, str]]
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dual")
    options: dict[str, Any] = {"vision_precision": "fp32", "verify": False}
    export_bundle(write_clip(root / "c"), root / "clip", **options)
    export_bundle(write_siglip(root / "s"), root / "siglip", **options)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(5):
        pixels = RNG.integers(0, 256, (40 + i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def loaded(folder: Path, **options: Any) -> DualEncoder:
    return edgevlm.load_dual(folder, **options)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))

    def called(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgevlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return called


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_rows_are_of_length_one_and_the_same_alone_and_together(
    folder: Path, photos: Path, name: str
) -> None:
    with loaded(folder / name) as model:
        paths = sorted(photos.iterdir())
        counted: list[int] = []
        together = model.embed_images(paths, batch=2, progress=lambda p: counted.append(p.done))
        alone = np.stack([model.embed_image(path) for path in paths])
        texts = model.embed_text(["A red circle", "", "x" * 900])
        assert alone.dtype == together.dtype == texts.dtype == np.float32
        assert alone.shape == (5, model.spec.width) and texts.shape == (3, model.spec.width)
        np.testing.assert_allclose(alone, together, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(model.embed_text("A red circle"), texts[:1], atol=1e-5)
        assert counted == [0, 1, 2, 3, 4, 5]
        assert model.embed_images([]).shape == model.embed_text([]).shape == (0, model.spec.width)


def test_scores_are_shares_of_clip_and_chances_of_siglip(folder: Path, photos: Path) -> None:
    labels = ["dog", "cat", "a red car"]
    with loaded(folder / "clip") as model:
        scores = model.classify(photos / "0.png", labels)
        assert sum(s.score for s in scores) == pytest.approx(1)
        assert [s.score for s in scores] == sorted((s.score for s in scores), reverse=True)
        cosines = {s.label: s.cosine for s in scores}
        rows = model.embed_text([f"a photo of a {label}." for label in labels])
        expected = rows @ model.embed_image(photos / "0.png")
        assert [cosines[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)
        raw = model.classify(photos / "0.png", ["dog"], template="{}")
        assert raw[0].cosine != pytest.approx(cosines["dog"], abs=1e-4)
        both = model.embed_labels(["dog"], ["{}", "a {}"])
        mean = model.embed_text(["dog", "a dog"]).mean(0)
        np.testing.assert_allclose(both[0], mean / np.linalg.norm(mean), atol=1e-5)
    with loaded(folder / "siglip") as model:
        (score,) = model.classify(photos / "0.png", ["dog"])
        logit = model.spec.scale * score.cosine + model.spec.bias
        assert score.score == pytest.approx(1 / (1 + np.exp(-logit)))
        assert model.scores(np.array([-1e9, 1e9])).tolist() == [0, 1]


def test_a_transparent_picture_and_a_palette_become_rgb_first(folder: Path) -> None:
    rgba = Image.fromarray(RNG.integers(0, 256, (50, 70, 4), np.uint8), "RGBA")
    palette = Image.fromarray(RNG.integers(0, 256, (50, 70, 3), np.uint8)).quantize(16)
    with loaded(folder / "clip") as model:
        for picture in (rgba, palette):
            first = model.embed_image(picture.convert("RGB"))
            np.testing.assert_array_equal(model.embed_image(picture), first)


def test_one_function_loads_whatever_a_bundle_is(folder: Path, photos: Path) -> None:
    made: Any = edgevlm.load(folder / "clip", threads=1)
    with made:
        assert type(made) is edgevlm.DualEncoder
        assert made.embed_image(photos / "0.png").shape == (24,)


def test_texts_are_cleaned_as_each_model_was_trained() -> None:
    assert cleaned("A_dog,  RUNS!", "siglip") == "adog runs"
    assert cleaned("A_dog,  RUNS!", "canonicalize") == "a dog runs"
    assert cleaned("A_dog,  RUNS!", "lower") == "a_dog,  runs!"
    assert cleaned("A_dog,  RUNS!", "") == "A_dog,  RUNS!"


def test_what_cannot_be_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="clip: a model that embeds has no kv; leave it out"):
        edgevlm.load(folder / "clip", kv="f16")
    with pytest.raises(PromptError, match=r"pico: answers questions .* edgevlm\.load loads it"):
        edgevlm.load_dual("pico")
    with pytest.raises(PromptError, match="threads must be at least 1"):
        edgevlm.load_dual(folder / "clip", threads=0)
    with pytest.raises(EngineMissing, match="unknown device 'abacus'"):
        edgevlm.load_dual(folder / "clip", device="abacus")
    model = loaded(folder / "clip", threads=1)
    for call, reason in (
        (lambda: model.classify(tmp_path, []), "at least one text"),
        (lambda: model.classify(tmp_path, "dog"), "labels must be a list"),
        (lambda: model.embed_labels(["dog"], "a photo"), "has no {} for the label"),
        (lambda: model.embed_text(cast("Any", [3])), "a int is not a text"),
        (lambda: model.embed_text(["\ud800"]), "not Unicode text"),
        (lambda: model.embed_text(["a"], batch=0), "batch must be at least 1"),
    ):
        with pytest.raises(PromptError, match=reason):
            call()
    with pytest.raises(ImageError, match=r"nothing\.png"):
        model.embed_images([tmp_path / "nothing.png"])
    model.close()
    model.close()
    with pytest.raises(ModelClosed, match="c is closed"):
        model.embed_text("a")


def test_classify_prints_labels_best_first(run: Run, folder: Path, photos: Path) -> None:
    given = ("classify", "dog", "cat", "-m", folder / "clip", "-i", photos / "0.png")
    code, out, err = run(*given)
    assert (code, err) == (0, "")
    shares = [float(line.split()[0]) for line in out.splitlines()]
    assert len(shares) == 2 and shares[0] > shares[1] and sum(shares) == pytest.approx(1, abs=1e-3)
    _, out, _ = run(*given, "--json")
    found = json.loads(out)
    assert found["file"] == str(photos / "0.png")
    assert {label["label"] for label in found["labels"]} == {"dog", "cat"}
    assert found["labels"][0]["score"] == pytest.approx(shares[0], abs=1e-4)


def test_classify_goes_through_a_folder_and_names_what_failed(
    run: Run, folder: Path, photos: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    code, out, err = run(
        "classify", "dog", "-m", folder / "siglip", "-i", photos, "-i", broken, "--json"
    )
    assert code == 1 and len(out.splitlines()) == 5
    assert "broken.png: is not a picture" in err and err.count("\n") == 1


def test_embed_prints_json_lines_or_writes_a_file(
    run: Run, folder: Path, photos: Path, tmp_path: Path
) -> None:
    code, out, _ = run("embed", "a dog", "-i", photos / "0.png", "-m", folder / "clip")
    text, picture = map(json.loads, out.splitlines())
    assert code == 0 and text["text"] == "a dog" and picture["file"].endswith("0.png")
    target = tmp_path / "rows.npz"
    code, out, _ = run("embed", "a dog", "-i", photos, "-m", folder / "clip", "--out", target)
    assert (code, out) == (0, "")
    with np.load(target) as stored:
        assert stored["rows"].shape == (6, 24) and stored["names"][0] == "a dog"
        np.testing.assert_allclose(stored["rows"][0], text["embedding"], atol=1e-6)


def test_commands_say_which_model_they_take(run: Run, folder: Path, photos: Path) -> None:
    for arguments, reason in (
        (("ask", "hi", "-m", folder / "clip"), "embeds pictures and texts and answers nothing"),
        (("caption", "-m", folder / "clip", "-i", photos), "edgevlm.load_dual"),
        (("chat", "-m", folder / "clip"), "`edgevlm use` chooses another"),
        (("tune", folder / "clip"), "no settings to be measured; `edgevlm bench`"),
        (("bench", "pico", "--quality", folder / "clip"), "c: embeds pictures"),
        (("classify", "dog", "-m", "pico", "-i", photos / "0.png"), "this takes a CLIP or SigLIP"),
        (("classify", "dog", "-i", photos / "0.png"), "no CLIP or SigLIP is installed"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and reason in err and err.count("\n") == 1
    code, _, err = run("bench", "pico", folder / "clip", "--quick")
    assert code == 2 and "c embeds and answers nothing: it is measured by itself" in err
    for arguments, said in (
        (("models", "show", folder / "clip"), "classify, embed, search"),
        (("models", "verify", folder / "clip"), "text.onnx"),
        (("doctor", "-m", folder / "clip"), "vision  cpu, fp32"),
    ):
        code, out, _ = run(*arguments)
        assert code == 0 and said in out


def test_a_model_card_says_what_it_does(folder: Path) -> None:
    written = card(open_bundle(folder / "clip"), "me/clip")
    assert 'edgevlm search "a dog in the snow" Photos -m clip' in written
    assert "pipeline_tag: zero-shot-image-classification" in written and "ask" not in written
