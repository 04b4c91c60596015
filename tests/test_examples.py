"""The example programs run; here on fakes, so that they cannot rot."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm.runtimes import fakes

EXAMPLES = Path(__file__).parent.parent / "examples"
BOX = "<loc0000><loc0000><loc0512><loc0512> circle"


@pytest.fixture
def picture(tmp_path, monkeypatch):
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
def test_example(example, arguments, expected, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](picture, *arguments)
    assert expected in capsys.readouterr().out


def test_every_example_is_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, path
