"""The example programs run, on fakes, and the examples in docstrings, on pico: they cannot rot."""

import doctest
import inspect
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import catalogue
from edgevlm.bundle import read_manifest, write_manifest
from edgevlm.hub.repository import RemoteFile, Repository
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


def test_every_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, path


def documented() -> Iterator[Any]:
    """What a user may call: public functions and classes, and their methods."""
    for thing in [edgevlm, *(getattr(edgevlm, name) for name in edgevlm.__all__)]:
        if isinstance(thing, type) and not issubclass(thing, Exception):
            methods = [m for n, m in vars(thing).items() if inspect.isfunction(m) and n[0] != "_"]
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
    wanted |= {"pull"}
    wanted |= {"stream", "ask", "chat", "caption", "ocr", "detect", "score", "embed_image"}
    assert wanted <= tried
