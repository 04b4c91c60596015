"""A bundle at other precisions: the bytes of a direct export, or a refusal that says what to do."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest

from edgevlm import cleanup
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli import cli
from edgevlm.errors import BundleError, ExportError, ParityError
from edgevlm.export import child, export_bundle, requantize, requantize_bundle
from edgevlm.export.gguf import tools
from edgevlm.export.parity import compare
from tests.checkpoints.paligemma import write_paligemma
from tests.test_export_bundle import arrays

pytestmark = pytest.mark.usefixtures("children_inside")


def contents(bundle: Bundle) -> dict[str, str]:
    return {r.file: r.sha256 for c in bundle.manifest.all_components for r in c.files}


def test_the_bytes_of_a_direct_export(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    wanted: dict[str, Any] = {
        "quant": "q4_k_m",
        "vision_precision": ["qdq8", "fp32", "int4", "fp16"],
    }
    direct = export_bundle(paligemma_checkpoint, tmp_path / "direct", verify=False, **wanted)
    made = requantize_bundle(paligemma_bundle.folder, tmp_path / "made", verify=False, **wanted)
    assert contents(made) == contents(direct)
    assert open_bundle(tmp_path / "made", "full").vision_precisions == made.vision_precisions
    assert made.manifest.token_embedding == direct.manifest.token_embedding


def test_from_halves_of_a_checkpoint_in_halves(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", dtype="float16")
    halves = export_bundle(
        folder, tmp_path / "halves", quant="f16", vision_precision="fp16", verify=False
    )
    made = requantize_bundle(
        halves.folder, tmp_path / "made", quant="q8_0", vision_precision="int8", verify=False
    )
    direct = export_bundle(
        folder, tmp_path / "direct", quant="q8_0", vision_precision="int8", verify=False
    )
    found, expected = contents(made), contents(direct)
    assert found["decoder.gguf"] == expected["decoder.gguf"]


def test_what_is_not_named_stays_and_what_changes_is_measured_anew(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quant": "f16", "vision_precision": "fp16"}
    old = export_bundle(paligemma_checkpoint, tmp_path / "old", name="mine", **options)
    made = requantize_bundle(old.folder, tmp_path / "new", quant="q8_0")
    manifest = open_bundle(tmp_path / "new", "full").manifest
    assert manifest == made.manifest
    for part in ("vision", "projector"):
        assert manifest.components[part] == old.manifest.components[part]
    assert manifest.components["decoder"].precision == "q8_0"
    # Where it comes from: the checkpoint, and the bundle in between.
    assert manifest.source[: len(old.manifest.source)] == old.manifest.source
    added = {r.file: r.sha256 for r in manifest.source[len(old.manifest.source) :]}
    assert added["bundle/decoder.gguf"] == contents(old)["decoder.gguf"]
    stages = {s.stage: s for s in manifest.parity}
    assert stages["tokens"] in old.manifest.parity and stages["pixels"] in old.manifest.parity
    assert stages["divergence"].metric == "mean KL, nats to fp16 + f16"
    assert 0 < stages["divergence"].worst <= stages["divergence"].tolerance
    assert abs(stages["features"].worst) < 1e-12  # the same encoder


def test_a_bundle_that_is_off_is_not_kept(
    paligemma_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([arrays(1), arrays()])
    monkeypatch.setattr(compare, "probe", lambda *_: next(answers))
    with pytest.raises(ParityError, match="features differs from the source"):
        requantize_bundle(paligemma_bundle.folder, tmp_path / "new", quant="q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(paligemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of which nothing is whole any more."""
    out = tmp_path_factory.mktemp("small") / "bundle"
    export_bundle(paligemma_checkpoint, out, verify=False)
    return out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--quant", "q8_0"], "decoder is in q4_k_m, from which q8_0 would gain nothing or lose"),
        (["--quant", "f16"], "export the checkpoint again with --quant f16"),
        (["--vision-precision", "fp16"], "encoder is in int8, from which fp16 would gain nothing"),
        (["--vision-precision", "qdq8"], "checkpoint again with --vision-precision qdq8"),
        ([], "is to be changed; name --quant, --vision-precision or --languages"),
        (["--quant", "q4_k_m", "--calibration", "nowhere"], "nowhere: is not a folder"),
    ],
)
def test_refusals_are_one_line(small: Path, tmp_path: Path, words: list[str], problem: str) -> None:
    asked = ["requantize", str(small), str(tmp_path / "new"), *words]
    with pytest.raises(Exception, match=problem) as caught:
        click.testing.CliRunner().invoke(cli, asked, catch_exceptions=False, standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "Export",
    "the disk fills up during `requantize`",
    "one line; nothing is left of the new bundle",
)
def test_a_disk_that_fills_up(
    paligemma_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requantize, "_vision_at", full)
    with pytest.raises(ExportError, match="stopped .No space left on device.; make room"):
        requantize_bundle(paligemma_bundle.folder, tmp_path / "out", quant="q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_destination_is_refused_before_anything_is_read(
    paligemma_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    monkeypatch.setattr(requantize, "plan", lambda *_: pytest.fail("read"))
    with pytest.raises(BundleError, match=r"not a bundle \(it holds thesis.txt\); choose another"):
        requantize_bundle(paligemma_bundle.folder, tmp_path, quant="q8_0")


def test_a_folder_that_a_link_names_is_filled(paligemma_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    made = requantize_bundle(paligemma_bundle.folder, tmp_path / "out", quant="f16", verify=False)
    assert (tmp_path / "out").is_symlink()
    assert open_bundle(tmp_path / "disk", "full").manifest == made.manifest


def test_a_bundle_does_not_replace_itself(paligemma_bundle: Bundle) -> None:
    before = contents(paligemma_bundle)
    with pytest.raises(ExportError, match="is the bundle itself; choose another folder"):
        requantize_bundle(paligemma_bundle.folder, paligemma_bundle.folder, quant="q8_0")
    assert contents(open_bundle(paligemma_bundle.folder, "full")) == before


@pytest.mark.fault(
    "Export",
    "the disk fills up while llama.cpp writes",
    "one line that names the disk, not llama.cpp's words",
)
def test_a_disk_that_llama_cpp_fills_up(
    paligemma_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says "iostream error" of that."""
    free = iter([1 << 40, 4096])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(free)}))
    failing = [sys.executable, "-c", "raise SystemExit('iostream error')"]
    monkeypatch.setattr(child, "command", lambda *_: failing)
    monkeypatch.setattr(tools, "process", cleanup.process)
    with pytest.raises(ExportError, match="stopped .No space left on device.; make room"):
        requantize_bundle(paligemma_bundle.folder, tmp_path / "out", quant="q8_0", verify=False)
    assert list(tmp_path.iterdir()) == []
