"""Speeds of a dual encoder, beside transformers and torch's own ONNX export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edgevlm import cli
from edgevlm.benchmarks import dual
from edgevlm.errors import BenchError
from edgevlm.export import export_bundle
from tests.checkpoints.dual import write_clip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_clip(tmp_path_factory.mktemp("bench") / "checkpoint")
    export_bundle(folder, folder.with_name("clip"), vision_precision="fp32", verify=False)
    return folder


def test_every_engine_makes_the_same_row(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "_SECONDS", 0.0)
    for engine in (dual.OURS, *dual.PEERS):
        folder = checkpoint.with_name("clip") if engine == dual.OURS else checkpoint
        asked = {"device": "cpu", "threads": 1, "batches": [1, 2]}
        event = dual.measure(engine, str(folder), asked)
        assert {*event["pictures"]} == {*event["texts"]} == {1, 2}
        assert min(*event["pictures"].values(), *event["texts"].values()) > 0
        if engine == dual.OURS:
            row = event["row"]
        assert event["row"] == pytest.approx(row, abs=1e-5)


def test_engines_take_turns_and_what_fails_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measured(engine: str, *_: Any) -> dict[str, Any]:
        asked.append(engine)
        if engine.startswith("ONNX"):
            return {"failed": "out of memory"}
        speeds = {1: 10.0 + len(asked), 4: 20.0}
        return {"pictures": speeds, "texts": speeds, "load_ms": 500.0, "row": [1.0, 0.0]}

    monkeypatch.setattr(dual, "_measured", measured)
    clip = str(checkpoint.with_name("clip"))
    arguments = [clip, "--peers", "--checkpoint", str(checkpoint), "--runs", "2"]
    monkeypatch.setattr(sys, "argv", ["edgevlm", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, _ = capsys.readouterr()
    assert ended.value.code == 0
    assert asked == [*(dual.OURS, *dual.PEERS), *(dual.OURS, "transformers fp32")]
    assert "ONNX fp32, one by one: out of memory" in out and "1.0000" in out and "0.50 s" in out
    with pytest.raises(BenchError, match="name the checkpoint"):
        dual.compare(checkpoint, peers=True)
