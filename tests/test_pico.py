"""The built-in model: it is there, it is small, and it answers about the pictures of examples/."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgevlm
from edgevlm import VLM
from edgevlm.bundle import open_bundle
from edgevlm.models import BUILT_IN, installed, resolve

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "shapes.png"
# Where the circle of examples/shapes.png was drawn: x0, y0, x1, y1 in pixels of 480 x 360.
CIRCLE = (43, 48, 167, 172)


@pytest.fixture(scope="module")
def pico() -> Iterator[VLM]:
    with edgevlm.load() as vlm:
        yield vlm


def test_it_is_the_default_and_goes_by_its_name() -> None:
    assert resolve(None) == installed()[BUILT_IN]
    bundle = open_bundle(resolve(BUILT_IN), check="full")
    assert bundle.manifest.name == BUILT_IN
    assert bundle.manifest.license == "apache-2.0"
    assert bundle.manifest.parity and all(s.ok for s in bundle.manifest.parity)


def test_it_fits_in_twelve_megabytes() -> None:
    assert sum(f.stat().st_size for f in resolve(None).iterdir()) < 12e6


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("answer en what shape is red?", "circle"),
        ("answer en what is below the circle?", "triangle"),
        ("answer en what is right of the circle?", "square"),
        ("answer en what is left of the star?", "triangle"),
        ("answer en what is above the star?", "square"),
        ("answer en how many shapes are there?", "4"),
        ("answer en is there a blue circle?", "no"),
        ("answer en what colour is the star?", "green"),
        ("caption en", "a red circle, a blue square, a yellow triangle and a green star"),
    ],
)
def test_it_answers_about_drawn_shapes(pico: VLM, prompt: str, answer: str) -> None:
    assert pico.ask(prompt, image=SHAPES).text == answer


def test_it_finds_a_shape(pico: VLM) -> None:
    (box,) = pico.detect("circle", image=SHAPES)
    drawn = CIRCLE
    assert box.label == "circle"
    width = max(0, min(box.x1, drawn[2]) - max(box.x0, drawn[0]))
    height = max(0, min(box.y1, drawn[3]) - max(box.y0, drawn[1]))
    areas = (box.x1 - box.x0) * (box.y1 - box.y0) + (drawn[2] - drawn[0]) * (drawn[3] - drawn[1])
    assert width * height / (areas - width * height) > 0.5


def test_it_reads_a_word_and_nothing_where_there_is_none(pico: VLM) -> None:
    assert pico.ocr(image=ROOT / "examples" / "sign.png").text == "OPEN"
    assert pico.ocr(image=SHAPES).text == ""


@pytest.mark.fault(
    "Command line",
    "LC_ALL=C and words that are not ASCII",
    "one line with the cure",
)
def test_a_prompt_that_the_locale_cannot_hold_is_refused_with_the_cure() -> None:
    prompt = "опиши".encode()
    command: list[str | bytes] = [sys.executable, "-m", "edgevlm", "ask", prompt, "-i", str(SHAPES)]
    ascii = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    refused = subprocess.run(command, capture_output=True, env=ascii)
    assert (refused.returncode, refused.stdout) == (1, b"")
    said = refused.stderr.decode().splitlines()
    assert said[-1].startswith("edgevlm: the prompt contains a byte at position 0")
    assert said[-1].endswith("set PYTHONUTF8=1 where you type UTF-8")
    assert not subprocess.run(
        command, capture_output=True, env=ascii | {"PYTHONUTF8": "1"}
    ).returncode


def test_the_first_command_of_the_readme() -> None:
    prompt = "answer en what shape is red?"
    command = [sys.executable, "-m", "edgevlm", "ask", prompt, "-i", str(SHAPES)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "circle\n"
    assert "built-in" in found.stderr
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    reply = json.loads(found.stdout)
    assert (reply["text"], reply["finish_reason"]) == ("circle", "stop")
