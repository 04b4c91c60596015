"""A whole export: the bundle it makes, how it is compared, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import BundleError, EdgeVLMError, ExportError, ParityError, SourceError
from edgevlm.export import components, export_bundle, pipeline, precisions
from edgevlm.export.options import WriteOptions
from edgevlm.export.parity import compare
from edgevlm.export.pipeline import read
from edgevlm.types import Progress
from tests import inside
from tests.checkpoints.paligemma import write_paligemma
from tests.test_export_source import with_nan

REFERENCE = "edgevlm.export.parity.references.paligemma.Reference.run"


def quick(source: Path, out: Path | str, **options: Any) -> Bundle:
    return export_bundle(
        source, out, **{"quant": "f32", "vision_precision": "fp32", "verify": False, **options}
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_verified_bundle(tmp_path: Path, version: int, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", version=version, layout="c", shards=2)
    out = tmp_path / "bundle"
    # One of them as users export.
    with nullcontext() if version == 1 else inside.children():
        made = quick(folder, out, name="mine", verify=True)
    assert capfd.readouterr() == ("", "")
    found = open_bundle(out, "full").manifest
    assert found == made.manifest
    assert (found.name, found.family) == ("mine", "paligemma")
    assert {r.file for r in found.source} >= {"config.json", "tokenizer.model"}
    stages = {s.stage: s for s in found.parity}
    assert {"tokens", "pixels", "features", "embeddings", "prefill"} <= stages.keys()
    assert all(s.ok for s in stages.values())
    # The promise: at most 5e-3 on logits with a deviation of 5, and the same greedy tokens.
    assert stages["answer"].worst <= stages["answer"].tolerance == 0.001
    assert stages["greedy"].worst == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_several_vision_precisions_are_each_compared(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    wanted = ["int8", "fp16", "qdq8"]
    with inside.children():
        quick(paligemma_checkpoint, tmp_path / "out", vision_precision=wanted, verify=True)
    bundle = open_bundle(tmp_path / "out", "full")
    assert list(bundle.vision_precisions) == wanted
    assert bundle.vision("qdq8").name == "vision.qdq8.onnx"
    stages = {s.stage: s for s in bundle.manifest.parity}
    for precision in wanted[1:]:
        for part in ("features", "embeddings"):
            found = stages[f"{part} {precision}"]
            assert found.ok and found.tolerance == precisions.vision_precision(precision).cosine
    assert 0 < stages["features fp16"].worst < stages["features qdq8"].worst


def test_vision_precisions_are_named_once(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="name each vision precision once, and at least one"):
        quick(paligemma_checkpoint, tmp_path / "out", vision_precision=["int8", "int8"])


def arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (17, 300)).astype(np.float32)
    return {
        "pixels": rng.normal(size=(1, 3, 8, 8)).astype(np.float32),
        "features": rng.normal(size=(1, 4, 16)).astype(np.float32),
        "embeddings": rng.normal(size=(1, 4, 16)).astype(np.float32),
        "prompt_ids": np.array([2, 5, 6], np.int32),
        "logits": logits,
        "tokens": logits[:-1].argmax(axis=1).astype(np.int32),
    }


def failed(change: Callable[[dict[str, Any]], None]) -> list[str]:
    options, ours, source = WriteOptions.checked("f32", "fp32"), arrays(), arrays()
    change(ours)
    return [s.stage for s in compare.compare(options, ours, source) if not s.ok]


@pytest.mark.parametrize(
    ("name", "amount", "stages"),
    [
        ("pixels", 1e-3, ["pixels"]),
        ("features", 1.0, ["features"]),
        ("embeddings", 1.0, ["embeddings"]),
        ("prompt_ids", 1, ["prompt"]),
        ("logits", 0.0, []),
        ("tokens", 1, ["greedy"]),
    ],
)
def test_each_stage_is_compared(name: str, amount: float, stages: list[str]) -> None:
    def change(ours: dict[str, Any]) -> None:
        ours[name].flat[7 % ours[name].size] += amount

    assert failed(change) == stages


def test_other_logits_fail_every_stage_of_the_decoder() -> None:
    def change(ours: dict[str, Any]) -> None:
        ours["logits"] = arrays(1)["logits"]

    assert failed(change) == ["prefill", "answer", "divergence"]


def test_another_shape_is_an_error() -> None:
    def change(ours: dict[str, Any]) -> None:
        ours["features"] = ours["features"][:, :2]

    with pytest.raises(ExportError, match="features has shape"):
        failed(change)


def test_a_bundle_that_is_off_is_not_kept(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "probe", lambda *_: arrays(1))
    monkeypatch.setattr(REFERENCE, lambda *_: arrays())
    with pytest.raises(ParityError, match="pixels differs from the source") as caught:
        quick(paligemma_checkpoint, tmp_path / "out", verify=True)
    assert caught.value.stage == "pixels" and caught.value.worst > caught.value.tolerance
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_transformers_cannot_run(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("no such thing\nmore")

    monkeypatch.setattr(compare, "probe", lambda *_: arrays())
    monkeypatch.setattr(REFERENCE, fail)
    with pytest.raises(ExportError, match=r"cannot run the source \(no such thing\); export"):
        quick(paligemma_checkpoint, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "Export",
    "too little memory to compare with the original",
    "refused before anything is written, with `--no-verify` as the cure",
)
def test_too_little_memory_to_verify(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 1 << 29, "total": 1 << 30})
    monkeypatch.setattr(psutil, "virtual_memory", free)
    with pytest.raises(ExportError, match="export without it \\(--no-verify\\)"):
        quick(paligemma_checkpoint, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "Export",
    "too little room on the disk",
    "refused in numbers before anything is written",
)
def test_too_little_disk(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="GB of disk"):
        quick(paligemma_checkpoint, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("Export", "the disk fills up on the way", "one line; nothing is left")
def test_a_disk_that_fills_up(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(components, "_write_vision", full)
    with pytest.raises(ExportError, match="stopped \\(No space left on device\\); make room"):
        quick(paligemma_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_of_disk_covers_what_is_written(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle
) -> None:
    job = read(paligemma_checkpoint)
    assert (
        components._disk_bytes(job, WriteOptions.checked("f32", "fp32")) >= paligemma_bundle.bytes
    )


@pytest.mark.fault("Export", "an interrupt at any stage", "nothing is left")
@pytest.mark.parametrize("stage", ["decoder", "quantize", "vision", "projector", "hash"])
def test_an_interrupt_leaves_nothing(
    paligemma_checkpoint: Path, tmp_path: Path, stage: str
) -> None:
    def interrupt(step: Progress) -> None:
        if step.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(paligemma_checkpoint, tmp_path / "out", quant="q8_0", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "Export",
    "Ctrl-C reaches the command and its children",
    "exit code 130, nothing is left",
)
def test_ctrl_c_at_the_terminal_leaves_nothing(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from edgevlm.export import export_bundle\n"
        "def say(step): print(step.stage, flush=True)\n"
        "try: export_bundle(sys.argv[1], sys.argv[2], verify=False, progress=say)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(paligemma_checkpoint), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    assert child.stdout
    child.stdout.readline()
    os.killpg(child.pid, signal.SIGINT)
    child.communicate()
    assert child.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_progress_of_every_stage_reaches_its_end(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    steps: list[Progress] = []
    quick(paligemma_checkpoint, tmp_path / "out", quant="q4_k_m", progress=steps.append)
    last = {step.stage: step for step in steps}
    stages = ["decoder", "quantize", "vision", "projector", "self-check", "hash", "hash source"]
    assert list(last) == stages
    assert all(step.done == step.total for step in last.values())
    assert all(0 <= s.done <= s.total and s.unit for s in steps)


def test_a_folder_that_is_no_bundle_is_left_alone(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        quick(paligemma_checkpoint, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("out", ["full", "file", "file/out", "link", "n" * 300])
def test_a_bad_destination_is_refused_before_anything_is_read(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(pipeline, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(BundleError) as caught:
        quick(paligemma_checkpoint, tmp_path / out)
    assert str(caught.value).startswith(str(tmp_path / out)) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link"]


def test_an_export_into_the_current_folder(
    paligemma_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = quick(paligemma_checkpoint, ".", quant="q8_0", verify=True)
    assert bundle.folder == Path(".")
    assert open_bundle(tmp_path, "full").manifest == bundle.manifest
    assert {p.name for p in tmp_path.iterdir()} == {
        "edgevlm.json",
        *(r.file for c in bundle.manifest.all_components for r in c.files),
    }


def test_an_older_bundle_survives_a_failed_export(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quick(paligemma_checkpoint, out)
    before = open_bundle(out).manifest
    bad = write_paligemma(tmp_path / "bad", edit=with_nan)
    with pytest.raises(SourceError):
        quick(bad, out)
    assert open_bundle(out, "full").manifest == before
    assert quick(paligemma_checkpoint, out, name="newer").manifest.name == "newer"


def test_the_same_export_twice_is_the_same_bundle(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    assert quick(paligemma_checkpoint, tmp_path / "out").manifest == paligemma_bundle.manifest


def test_importing_the_door_is_light() -> None:
    heavy = {"torch", "transformers", "optimum", "onnx", "onnxruntime", "llama_cpp", "gguf"}
    code = "import sys, edgevlm.export; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())


def test_every_error_is_one_line(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    for bad in ({"quant": "q9"}, {"vision_precision": "int1"}):
        with pytest.raises(EdgeVLMError) as caught:
            quick(paligemma_checkpoint, tmp_path / "out", **bad)
        assert "\n" not in str(caught.value)
