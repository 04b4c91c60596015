"""A dual encoder's bundle at other precisions, and its check of a machine at its first use."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgevlm
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli import cli
from edgevlm.errors import EngineError, ExportError
from edgevlm.export import export_bundle, requantize_bundle
from edgevlm.manifest import write_manifest
from edgevlm.runtimes import dual_loading
from edgevlm.runtimes.vision.ort import Ort
from tests.checkpoints.dual import write_siglip
from tests.test_requantize import contents
from tests.test_self_check import Planted, negative


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("dual") / "checkpoint")


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Bundle:
    out = checkpoint.with_name("whole")
    return export_bundle(checkpoint, out, vision_precision="fp32", verify=False)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_bytes_of_a_direct_export(checkpoint: Path, whole: Bundle, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"vision_precision": ["int8", "fp32"]}
    direct = export_bundle(checkpoint, tmp_path / "direct", verify=False, **wanted)
    made = requantize_bundle(whole.folder, tmp_path / "made", **wanted)
    assert contents(made) == contents(direct)
    assert open_bundle(made.folder, "full").manifest == made.manifest
    assert made.manifest.components["text"].precision == "int8"
    measured = {s.stage: s for s in made.manifest.parity}
    assert [*measured] == ["vision", "vision fp32", "text"]
    assert "to fp32" in measured["text"].metric and all(s.ok for s in measured.values())
    check, expected = made.manifest.self_check, direct.manifest.self_check
    assert check and expected and {*check.tolerances} == {"int8", "fp32", "text"}
    np.testing.assert_allclose(check.features, expected.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(check.text, expected.text, rtol=1e-4, atol=1e-5)
    assert made.manifest.source[-1].file.startswith("bundle/")
    with edgevlm.load_dual(made.folder) as model, edgevlm.load_dual(whole.folder) as before:
        assert np.vdot(model.embed_text("a dog"), before.embed_text("a dog")) > 0.95


def test_from_halves_and_no_further(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"verify": False}
    halves = export_bundle(checkpoint, tmp_path / "halves", vision_precision="fp16", **options)
    made = requantize_bundle(halves.folder, tmp_path / "int8", vision_precision="int8")
    assert {c.precision for c in made.manifest.components.values()} == {"int8"}
    for bundle, wanted, reason in (
        (made, "int4", "its text tower is in int8, from which int4 would gain nothing or lose"),
        (halves, "fp32", "its text tower is in fp16, from which fp32 would gain nothing"),
    ):
        with pytest.raises(ExportError, match=reason):
            requantize_bundle(bundle.folder, tmp_path / "no", vision_precision=wanted)
    # A second vision tower leaves the text tower as it is.
    more = requantize_bundle(halves.folder, tmp_path / "two", vision_precision=["fp16", "int8"])
    assert more.manifest.components["text"] == halves.manifest.components["text"]
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "nothing is to be changed; name --vision-precision"),
        (("--quant", "q4_0"), "has no decoder, which --quant is for; leave it out"),
        (("--languages", "en"), "has no decoder, which --languages is for"),
        (("--imatrix",), "has no decoder, which --imatrix is for"),
    ],
)
def test_options_of_a_decoder_are_refused(
    whole: Bundle, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    arguments = ["requantize", str(whole.folder), str(tmp_path / "out"), *options]
    error = CliRunner().invoke(cli, arguments).exception
    assert isinstance(error, ExportError) and reason in str(error)


# The first use on a machine


def planted(graph: str, monkeypatch: pytest.MonkeyPatch) -> Planted:
    fake = Planted(graph, negative)
    monkeypatch.setattr(dual_loading, "Ort", lambda: Ort(fake))
    return fake


def test_right_towers_are_compared_once(
    whole: Bundle, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = planted("none", monkeypatch)
    for n in (4, 6):  # a check and a row of each tower, then rows alone
        with edgevlm.load_dual(whole.folder) as model:
            model.embed_text("a")
            model.embed_image(np.zeros((9, 9, 3), np.uint8))
        assert fake.ran == n
    assert len([*(home / "cache" / "devices" / "first-use").iterdir()]) == 2


def test_wrong_towers_are_refused_and_a_right_precision_taken(
    whole: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("text.onnx", monkeypatch)
    for _ in range(2):  # found, then remembered
        with edgevlm.load_dual(whole.folder) as model:
            model.embed_image(np.zeros((9, 9, 3), np.uint8))
            with pytest.raises(EngineError, match=r"^the text tower computes wrongly .* fp32\)"):
                model.embed_text("a")
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "another"))
    planted("vision.onnx", monkeypatch)
    with edgevlm.load_dual(whole.folder) as model:
        with pytest.raises(EngineError, match="^the vision encoder computes wrongly"):
            model.embed_image(np.zeros((9, 9, 3), np.uint8))
        model.embed_text("a")
    both = requantize_bundle(
        whole.folder, tmp_path / "both", vision_precision=["int8", "fp32"], verify=False
    )
    with edgevlm.load_dual(both.folder) as model:
        assert model.placement.precision == "fp32"
        assert "cpu at int8: its features differ" in model.placement.notes[0]


def test_a_bundle_without_numbers_is_not_compared(
    whole: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    shutil.copytree(whole.folder, older)
    write_manifest(older, replace(whole.manifest, self_check=None))
    fake = planted("text.onnx", monkeypatch)
    with edgevlm.load_dual(older) as model:
        assert model.embed_text("a").shape == (1, model.spec.width)
    assert fake.ran == 1
    made = requantize_bundle(older, tmp_path / "made", vision_precision="int8", verify=False)
    assert made.manifest.self_check and made.manifest.self_check.text
