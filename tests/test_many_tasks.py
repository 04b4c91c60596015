"""A model's own tasks over many pictures, as `ask` has it; boxes and masks as one data set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.cli import find
from edgevlm.manifest import read_manifest, write_manifest
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.types import Box
from tests.test_cli import BOXES, Terminal
from tests.test_many import ABC, edge, files, lines, paint, photos

__all__ = ["edge", "photos"]  # fixtures

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (("caption",), "caption en"),
        (("caption", "-l", "de"), "caption de"),
        (("ocr",), "ocr"),
        (("answer", "how many?"), "answer en how many?"),
        (("detect", "a", "b"), "detect a ; b"),
    ],
)
def test_a_task_over_a_folder_goes_on_where_it_was(
    edge: Terminal, photos: Path, task: tuple[str, ...], prompt: str
) -> None:
    (photos / "b.png").write_bytes(b"no picture")
    run = (*task, "-i", photos, "--jsonl", "out.jsonl")
    code, out, err = edge(*run)
    assert (code, out) == (1, "") and "2 answered, 1 failed: out.jsonl" in err
    assert files() == ABC and {line["prompt"] for line in lines()} == {prompt}
    paint(photos / "b.png", 7)
    assert edge(*run)[2] == "1 answered, 2 were before, 0 failed: out.jsonl\n"
    assert sorted(files()) == ABC and len(edge.loaded) == 2


def test_a_task_answers_after_each_files_name(edge: Terminal) -> None:
    edge.says("one", "two", "three")
    out = edge("caption", "-i", "photos/*")[1]
    assert out == "photos/a.JPG: one\nphotos/b.png: two\nphotos/c.webp: three\n"
    assert edge("ocr", "--each", "-i", "photos/b.png")[1] == "photos/b.png: one\n"


def test_a_page_of_text_has_its_room_in_a_folder_too(
    edge: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "word " * 300
    monkeypatch.setattr(edgevlm, "load", lambda *_, **__: fakes.vlm(page, context_length=8192))
    edge("ocr", "-i", "photos", "--jsonl", "out.jsonl")
    assert {len(line["text"]) for line in lines()} == {1024}


def test_a_task_that_the_model_lacks_is_refused_before_it_is_loaded(edge: Terminal) -> None:
    code, out, err = edge("ground", "-i", "photos", "--jsonl", "out.jsonl")
    assert (code, out, edge.loaded) == (1, "", []) and "no task 'ground'" in err
    assert not Path("out.jsonl").exists()


def test_boxes_of_each_picture_are_lines_of_text(edge: Terminal) -> None:
    edge.says(BOXES, "", BOXES)
    code, out, err = edge("detect", "circle", "-i", "photos")
    found = "circle\t0 0 20 15", "star\t20 15 40 30"
    shown = [f"{file}: {line}" for file in ABC[::2] for line in found]
    assert (code, out.splitlines(), err) == (0, shown, "")
    (first, *_) = edge("detect", "circle", "-i", "photos", "--json")[1].splitlines()
    record = json.loads(first)
    assert (record["width"], record["height"]) == (40, 30)
    assert record["boxes"][1]["normalized"] == pytest.approx([0.5, 0.5, 1, 1], abs=1e-3)


def test_a_folder_is_one_data_set_whose_labels_have_one_number(edge: Terminal) -> None:
    edge.says(BOXES, "", "<loc0000><loc0000><loc1023><loc1023> star")
    code, out, err = edge("detect", "circle", "star", "-i", "photos", "--coco")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [image["file_name"] for image in found["images"]] == ABC
    assert [image["id"] for image in found["images"]] == [1, 2, 3]
    assert found["categories"] == [{"id": 1, "name": "circle"}, {"id": 2, "name": "star"}]
    kept = [(a["id"], a["image_id"], a["category_id"]) for a in found["annotations"]]
    assert kept == [(1, 1, 1), (2, 1, 2), (3, 3, 2)]
    assert found["annotations"][2]["bbox"] == [0, 0, 40, 30]


def test_a_data_set_has_what_was_found_before_and_lacks_what_failed(
    edge: Terminal, photos: Path
) -> None:
    (photos / "b.png").write_bytes(b"no picture")
    edge.says(BOXES)
    run = ("detect", "x", "-i", photos, "--jsonl", "out.jsonl", "--coco")
    code, out, err = edge(*run)
    assert code == 1 and "photos/b.png: is not a picture" in err
    assert [i["file_name"] for i in json.loads(out)["images"]] == ABC[::2]
    paint(photos / "b.png", 7)
    code, out, _ = edge(*run)
    whole = json.loads(out)
    assert code == 0 and [i["file_name"] for i in whole["images"]] == ABC
    assert len(whole["annotations"]) == 6 and len(edge.loaded) == 2
    assert edge(*run)[1] == out and len(edge.loaded) == 2  # From OUT alone.


def test_the_same_prompt_of_ask_is_another_question(edge: Terminal) -> None:
    edge.says(BOXES)
    edge("ask", "detect x", "-i", "photos", "--jsonl", "out.jsonl")
    code, out, _ = edge("detect", "x", "-i", "photos", "--jsonl", "out.jsonl", "--coco")
    assert code == 0 and len(json.loads(out)["images"]) == 3 and len(lines()) == 6


@pytest.fixture
def segments(edge: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """The command line with a manifest that has the task."""
    folder = shutil.copytree(edgevlm.models.built_in(), tmp_path / "segments")
    manifest = read_manifest(folder)
    prompt = replace(manifest.prompt, tasks={"segment": "segment {prompt}"})
    write_manifest(folder, replace(manifest, prompt=prompt))
    monkeypatch.setenv("EDGEVLM_MODEL", str(folder))
    return edge


def test_masks_are_kept_and_read_again(segments: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((30, 40), bool)
    mask[4:9, 3:7] = True
    masked = Box(3, 4, 7, 9, "cat", (1,) * 16, mask)
    monkeypatch.setattr(VLM, "masked", lambda *_: [masked])
    run = ("segment", "cat", "-i", "photos/b.png", "--jsonl", "out.jsonl", "--coco")
    first = segments(*run)[1]
    (annotation,) = json.loads(first)["annotations"]
    assert annotation["area"] == 20 and sum(annotation["segmentation"]["counts"]) == 1200
    assert segments(*run)[1] == first and len(segments.loaded) == 1
    (box,) = find._boxes(lines()[0])
    assert box.mask is not None and np.array_equal(box.mask, mask)


def test_boxes_without_masks_are_noted_once(segments: Terminal) -> None:
    segments.says("<loc0000><loc0000><loc0512><loc0512>" + "<seg001>" * 16 + " cat")
    code, out, err = segments("segment", "cat", "-i", "photos")
    assert (code, out.count("cat\t"), err.count("\n")) == (0, 3, 1)
    assert "Boxes without masks" in err


BAD = {
    "draw many": (["-i", "photos", "-o", "out.png"], 2, "-o draws one picture"),
    "two forms": (["-i", "photos", "--json", "--coco"], 2, "choose one"),
    "two pictures": (["-i", "photos/b.png", "-i", "photos/a.JPG"], 2, "--each finds in each"),
    "no picture": (["--coco"], 2, "name a picture with -i"),
    "overwrite what": (["-i", "photos", "--overwrite"], 2, "name of a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, edge: Terminal) -> None:
    arguments, expected, message = BAD[case]
    code, out, err = edge("detect", "x", *arguments)
    assert (code, out, err.count("\n"), edge.loaded) == (expected, "", 1, [])
    assert message in err


def test_pico_finds_shapes_in_a_folder(photos: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    shutil.rmtree(photos)
    photos.mkdir()
    shutil.copy(EXAMPLES / "shapes.png", photos)
    monkeypatch.setattr("sys.argv", ["edgevlm", "detect", "circle", "-i", "photos", "--coco"])
    with pytest.raises(SystemExit):
        edgevlm.cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == [
        {"id": 1, "file_name": "photos/shapes.png", "width": 480, "height": 360}
    ]
    assert found["annotations"][0]["bbox"] == pytest.approx([45, 48, 124, 124], abs=2)
