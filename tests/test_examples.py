"""The example programs run, on fakes, and the examples in docstrings, on pico: they cannot rot."""

import doctest
import importlib.util
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import catalogue
from edgevlm.coco import CocoSet
from edgevlm.hub.repository import RemoteFile, Repository
from edgevlm.manifest import read_manifest, write_manifest
from edgevlm.models import built_in
from edgevlm.runtimes import fakes

EXAMPLES = Path(__file__).parent.parent / "examples"
BOX = "<loc0000><loc0000><loc0512><loc0512> circle"


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(edgevlm, "load", lambda: fakes.vlm(BOX))
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


@pytest.mark.parametrize(
    ("example", "arguments", "expected"),
    [
        ("ask", ["caption en"], BOX),
        ("stream", ["caption en", "detect circle"], "4 cached"),
        ("find", ["out.png", "circle"], "circle: 0 0 40 30"),
        ("choose", ["what?", BOX, "a square"], "a square"),
    ],
)
def test_example(
    example: str,
    arguments: list[str],
    expected: str,
    picture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](picture, *arguments)
    assert expected in capsys.readouterr().out


# Ray's own start, on two processors that it believes to have.
WITH_RAY = """
import ray, runpy, sys
ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
runpy.run_path(sys.argv[1])["main"](sys.argv[2], "2")
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "pandas", "pyarrow")),
    reason="ray[data] is not installed",
)
def test_many_pictures_on_two_workers_of_ray(tmp_path: Path) -> None:
    for i in range(10):
        shutil.copyfile(EXAMPLES / ("sign.png", "shapes.png")[i % 2], tmp_path / f"{i}.png")
    ended = subprocess.run(
        [sys.executable, "-c", WITH_RAY, str(EXAMPLES / "many_ray.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        timeout=200,
    )
    answers = {row["file"]: row["text"] for row in map(json.loads, ended.stdout.splitlines())}
    assert set(answers) == {str(path) for path in tmp_path.resolve().iterdir()}, ended.stderr
    with edgevlm.load() as vlm:
        assert answers[str(tmp_path / "1.png")] == vlm.caption(EXAMPLES / "shapes.png").text


def test_every_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, path


def documented() -> Iterator[Any]:
    """What a user may call: public functions and classes, and their methods."""
    for thing in [edgevlm, CocoSet, *(getattr(edgevlm, name) for name in edgevlm.__all__)]:
        if isinstance(thing, type) and not issubclass(thing, Exception):
            own = [item for base in thing.__mro__[::-1] for item in vars(base).items()]
            methods = [m for n, m in dict(own).items() if inspect.isfunction(m) and n[0] != "_"]
            yield from [thing, *methods]
        elif inspect.isfunction(thing) or inspect.ismodule(thing):
            yield thing


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paligemma_checkpoint: Path) -> None:
    """The files and the installed model that examples name, in the working directory."""
    shutil.copyfile(EXAMPLES / "shapes.png", tmp_path / "photo.png")
    shutil.copyfile(EXAMPLES / "sign.png", tmp_path / "sign.png")
    (tmp_path / "checkpoint").symlink_to(paligemma_checkpoint)
    monkeypatch.chdir(tmp_path)
    entry = catalogue.entries()["smolvlm-256m"]
    there = (RemoteFile("model.safetensors", 1),)
    repository = Repository(entry.repo, str(entry.revision), there)
    monkeypatch.setattr("edgevlm.pulling.look_up", lambda *_: repository)
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    folder = tmp_path / "models" / entry.name
    shutil.copytree(built_in(), folder)
    write_manifest(folder, replace(read_manifest(folder), origin=entry.source))


def test_examples_in_docstrings(files: None) -> None:
    runner = doctest.DocTestRunner()
    finder = doctest.DocTestFinder(recurse=False)
    found = [t for thing in documented() for t in finder.find(thing, globs={"edgevlm": edgevlm})]
    tried = {test.name for test in found if test.examples}
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    wanted = {"load", "export_bundle", "VLM", "Chat", "Answer", "Message", "Reply", "edgevlm"}
    wanted |= {"pull", "CocoSet"}
    wanted |= {"stream", "ask", "chat", "caption", "ocr", "detect", "score", "image_embeddings"}
    assert wanted <= tried
