"""One prompt about many pictures: which are asked, what is written, and how a run goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import edgevlm
from edgevlm.cli import many, progress
from edgevlm.cli.jsonl import AnswerFile
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from tests.test_cli import BOXES, Terminal


@pytest.fixture
def edge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photos: Path
) -> Terminal:
    monkeypatch.setenv("EDGEVLM_MODEL", str(edgevlm.models.built_in()))
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures, and more that is none, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i, name in enumerate(("b.png", "a.JPG", "c.webp", "sub/d.png", ".e.png", ".hidden/f.png")):
        paint(folder / name, i)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    (folder / "answers.json").write_text("{}", encoding="utf-8")
    return folder


def paint(path: Path, grey: int) -> None:
    Image.fromarray(np.full((30, 40, 3), grey, np.uint8)).save(path)


def lines(path: str | Path = "out.jsonl") -> list[dict[str, Any]]:
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def files(path: str | Path = "out.jsonl") -> list[str]:
    return [line["file"] for line in lines(path)]


ABC = ["photos/a.JPG", "photos/b.png", "photos/c.webp"]


def test_each_picture_of_a_folder_is_answered_after_its_name(edge: Terminal, photos: Path) -> None:
    edge.says("one", "two", "three")
    code, out, err = edge("ask", "x", "-i", "photos/")
    assert (code, out, err) == (
        0,
        "photos/a.JPG: one\nphotos/b.png: two\nphotos/c.webp: three\n",
        "",
    )
    assert len(edge.loaded) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-i", "photos", "--recursive"], [*ABC, "photos/sub/d.png"]),
        (["-i", "photos/*.png"], ["photos/b.png"]),
        (["-i", "photos/*"], ABC),
        (["-i", "photos/**/*.png"], ["photos/b.png", "photos/sub/d.png"]),
        (["-i", "photos/**"], [*ABC, "photos/sub/d.png"]),
        (["-i", "*/.*.png"], ["photos/.e.png"]),
        (["-i", "photos/sub", "-i", "photos/[ab].*"], ["photos/sub/d.png", *ABC[:2]]),
        (["-i", "photos/b.png", "-i", "photos"], ["photos/b.png", "photos/a.JPG", "photos/c.webp"]),
        (["--each", "-i", "photos/b.png", "-i", "photos/a.JPG"], ["photos/b.png", "photos/a.JPG"]),
        (["-i", "photos/notes.txt", "--each"], ["photos/notes.txt"]),
    ],
)
def test_pictures_that_are_asked_about(
    edge: Terminal, arguments: list[str], expected: list[str]
) -> None:
    out = edge("ask", "x", *arguments, "--json")[1]
    assert [json.loads(line)["file"] for line in out.splitlines()] == expected


def test_a_list_of_files_is_one_request(edge: Terminal, photos: Path) -> None:
    _, out, _ = edge("ask", "x", "-i", "photos/b.png", "-i", "photos/a.JPG", "--json")
    assert json.loads(out)["tokens"]["image"] == 8  # four for each


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(edge: Terminal, photos: Path) -> None:
    paint(photos / "[ab].png", 1)
    assert edge("ask", "x", "-i", "photos/[ab].png")[1] == "a red circle\n"
    assert edge("ask", "x", "-i", "photos/[ab].png", "--each")[1].startswith("photos/[ab].png: ")


def test_a_system_message_is_a_part_of_the_question(
    edge: Terminal, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("ask", "x", "-i", photos, "--jsonl", "out.jsonl", "--system")
    code, out, err = edge(*asked, "Be brief.")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "its prompt template has no system message" in err and not edge.loaded
    told: list[str | None] = []
    chat = VLM.chat

    def heard(vlm: VLM, image: Any, *, system: str | None = None) -> Any:
        told.append(system)
        return chat(vlm, image, system=system)

    monkeypatch.setattr(VLM, "chat", heard)
    known = fakes.vlm(system=True).manifest
    monkeypatch.setattr(many, "read_manifest", lambda _: known)
    edge.says("one", system=True)
    for system in ("Be brief.", "Be brief.", "Be long."):
        assert edge(*asked, system)[0] == 0
    assert told == ["Be brief."] * 3 + ["Be long."] * 3 and files() == ABC * 2


def test_links_to_folders_end(edge: Terminal, photos: Path) -> None:
    for name in ("loop", "sub/loop"):
        (photos / name).symlink_to(photos.resolve())
    (photos / "gone.png").symlink_to("nowhere.png")
    for image in ("photos", "photos/**/*.*"):
        code, out, err = edge("ask", "x", "-i", image, "-r")
        assert code == 1 and out.count("\n") == 4
        assert err == "edgevlm: photos/gone.png: no such file\n"


def test_a_line_has_the_answer_and_what_it_was_asked(edge: Terminal, photos: Path) -> None:
    edge.says(BOXES)
    assert edge("ask", "x", "-i", "photos/b.png", "--jsonl", "out.jsonl")[:2] == (0, "")
    (line,) = lines()
    assert (line["file"], line["text"], line["finish_reason"]) == ("photos/b.png", BOXES, "stop")
    assert [box["label"] for box in line["boxes"]] == ["circle", "star"]
    assert line["tokens"]["image"] == 4 and line["timings"]["image_decode_ms"] > 0
    assert (line["prompt"], line["model"]) == ("x", "pico")
    assert (line["bytes"], "error" in line) == (os.path.getsize("photos/b.png"), False)


def test_a_second_run_asks_only_what_was_not_answered(edge: Terminal, photos: Path) -> None:
    (photos / "b.png").write_bytes(b"no picture")
    ask = ("ask", "x", "-i", photos, "--jsonl", "out.jsonl")
    code, _, err = edge(*ask)
    assert code == 1 and "2 answered, 1 failed: out.jsonl" in err
    assert "photos/b.png: is not a picture" in err
    assert "is not a picture" in lines()[1]["error"] and "text" not in lines()[1]
    assert edge(*ask)[0] == 1 and len(lines()) == 3  # Tried again, in the place of the old line.
    paint(photos / "b.png", 7)
    code, _, err = edge(*ask)
    assert (code, err) == (0, "1 answered, 2 were before, 0 failed: out.jsonl\n")
    assert files() == ["photos/a.JPG", "photos/c.webp", "photos/b.png"]
    assert all("text" in line for line in lines())
    n_loaded = len(edge.loaded)
    before = Path("out.jsonl").read_bytes()
    assert edge("ask", "x", "-i", photos.resolve(), "--jsonl", "./out.jsonl")[0] == 0
    assert len(edge.loaded) == n_loaded and Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("changed", ["picture", "prompt", "model", "options", "--overwrite"])
def test_what_changed_is_asked_again(
    edge: Terminal, photos: Path, changed: str, tmp_path: Path
) -> None:
    ask: list[object] = ["ask", "x", "-i", photos, "--jsonl", "out.jsonl"]
    edge(*ask)
    if changed == "picture":
        paint(photos / "b.png", 9)
        os.utime(photos / "b.png", (1, 1))
    elif changed == "prompt":
        ask[1] = "y"
    elif changed == "model":
        other = shutil.copytree(edgevlm.models.built_in(), tmp_path / "other")
        manifest = (other / "edgevlm.json").read_text(encoding="utf-8")
        manifest = manifest.replace('"name": "pico"', '"name": "other"')
        (other / "edgevlm.json").write_text(manifest, encoding="utf-8")
        ask += ["-m", other]
    else:
        ask += ["--overwrite"] if changed == "--overwrite" else ["--max-tokens", "2"]
    assert edge(*ask)[0] == 0
    expected = {"picture": [*ABC[::2], ABC[1]], "--overwrite": ABC}.get(changed, ABC * 2)
    assert files() == expected


def test_a_line_that_a_crash_cut_off_is_dropped(edge: Terminal, photos: Path) -> None:
    ask = ("ask", "x", "-i", photos, "--jsonl", "out.jsonl")
    edge(*ask)
    whole = Path("out.jsonl").read_bytes()
    for cut in (1, 30, len(whole.splitlines()[-1])):
        Path("out.jsonl").write_bytes(whole[:-cut])
        # A last line that lacks its end alone is an answer all the same.
        counts = "0 answered, 3 were before" if cut == 1 else "1 answered, 2 were before"
        assert counts in edge(*ask)[2]
        assert cut == 1 or files() == ABC
    (photos / "d.png").write_bytes((photos / "b.png").read_bytes())
    Path("out.jsonl").write_bytes(whole[:-1])
    assert edge(*ask)[0] == 0 and files() == [*ABC, "photos/d.png"]


@pytest.mark.fault(
    "Command line",
    "`--jsonl` names a file of something else",
    "refused, the file stays as it is",
)
@pytest.mark.parametrize(
    "content",
    [b"a text", b"a text\n", b'{"a": 1}\n', b'{"a', b"\x89PNG\r\n", b"[1]\n", b"{}\n", b"\n"],
)
def test_a_foreign_file_is_left_alone(edge: Terminal, photos: Path, content: bytes) -> None:
    Path("out.jsonl").write_bytes(content)
    for more in ((), ("--overwrite",)):
        code, out, err = edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl", *more)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "out.jsonl: line 1 is not an answer" in err and "another file" in err
    assert Path("out.jsonl").read_bytes() == content and not edge.loaded


BAD = {
    "a folder": (["-i", "photos", "--jsonl", "photos"], "is a folder"),
    "nowhere": (["-i", "photos", "--jsonl", "no/out.jsonl"], "does not exist"),
    "a device": (["-i", "photos", "--jsonl", os.devnull], "not a regular file"),
    "no name": (["-i", "photos", "--jsonl", ""], "name of a file"),
    "overwrite what": (["-i", "photos", "--overwrite"], "name of a file"),
    "no picture": (["--jsonl", "out.jsonl"], "with -i"),
    "each of none": (["--each"], "with -i"),
    "recursive file": (["-r", "-i", "photos/b.png"], "goes with a folder"),
    "stdin": (["-i", "-", "--jsonl", "out.jsonl"], "without a name"),
    "data URL": (["-i", "data:image/png;base64,AAAA", "--each"], "without a name"),
    "empty name": (["-i", " ", "--each"], "is empty; name"),
    "empty folder": (["-i", "empty"], "--recursive looks into"),
    "empty tree": (["-i", "empty", "-r"], "name another folder"),
    "no match": (["-i", "photos/*.gif"], "no pictures there"),
    "odd pattern": (["-i", "photos/**.png"], "photos/**"),
    "option": (["-i", "photos", "--temperature", "-1"], "temperature must be"),
    "model": (["-i", "photos", "-m", "no-such"], "no-such"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    case: str, edge: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    arguments, message = BAD[case]
    code, out, err = edge("ask", "x", *arguments)
    assert (code in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert err.startswith("edgevlm: ") and message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "photos"] and not edge.loaded


def test_out_in_the_folder_is_not_a_picture(edge: Terminal, photos: Path) -> None:
    for _ in range(2):
        assert edge("ask", "x", "-i", photos, "--jsonl", photos / "out.png")[0] == 0
    assert files(photos / "out.png") == ABC


def test_out_behind_a_link_and_its_mode_stay(edge: Terminal, photos: Path) -> None:
    Path("there").mkdir()
    Path("out.jsonl").symlink_to("there/real.jsonl")
    (photos / "b.png").write_bytes(b"")
    ask = ("ask", "x", "-i", photos, "--jsonl", "out.jsonl")
    edge(*ask)
    os.chmod("there/real.jsonl", 0o640)
    edge(*ask)
    assert Path("out.jsonl").is_symlink() and len(lines("there/real.jsonl")) == 3
    assert os.stat("there/real.jsonl").st_mode & 0o777 == 0o640
    assert [p.name for p in Path("there").iterdir()] == ["real.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files there")
def test_two_runs_do_not_write_to_one_file(edge: Terminal, photos: Path) -> None:
    with AnswerFile(Path("out.jsonl")).writing(lambda _: True):
        code, _, err = edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl")
    assert (code, err.count("\n")) == (1, 1) and "another edgevlm writes to it" in err
    assert edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl")[0] == 0


def test_failures_are_named_up_to_a_few(edge: Terminal, photos: Path) -> None:
    for i in range(8):
        (photos / f"bad{i}.png").write_bytes(b"")
    code, out, err = edge("ask", "x", "-i", photos)
    assert code == 1 and out.count("\n") == 3
    assert err.splitlines()[0] == "edgevlm: photos/bad0.png: is empty"
    assert len(err.splitlines()) == 6 and err.endswith("edgevlm: and 3 more that failed\n")
    assert edge("ask", "y" * 600, "-i", photos, "--jsonl", "out.jsonl")[0] == 1
    assert "shorten the prompt" in lines()[0]["error"] and len(lines()) == 11


def test_answers_that_were_cut_are_counted(edge: Terminal, photos: Path) -> None:
    err = edge("ask", "x", "-i", photos, "--max-tokens", 3)[2]
    assert err == "3 cut at --max-tokens or a full context.\n"


def test_answers_in_a_form_are_parsed_or_failed(edge: Terminal, photos: Path) -> None:
    Path("form.json").write_text('{"type": "integer"}', encoding="utf-8")
    edge.says("12", "12", "no number")
    form = ("--json-schema", "form.json", "--logprobs", 0)
    code, _, err = edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl", *form)
    assert code == 1 and "photos/c.webp: " in err
    assert [line.get("parsed") for line in lines()] == [12, 12, None]
    assert len(lines()[0]["logprobs"]) == 2 and "text" not in lines()[2]


def test_json_beside_a_file_goes_to_both(edge: Terminal, photos: Path) -> None:
    _, out, _ = edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl", "--json")
    assert out == Path("out.jsonl").read_text(encoding="utf-8")


def test_stats_of_each(edge: Terminal, photos: Path) -> None:
    err = edge("ask", "x", "-i", photos, "--stats")[2]
    assert err.count("first token") == 3 and "photos/a.JPG:\nload" in err


def test_the_bar_counts_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the terminal of whoever runs this, which may be one that shows no bars.
    environment = {"TERM": "xterm"}
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=environment)
    monkeypatch.setattr(progress, "err_console", lambda: screen)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress.PictureBar(total=5, before=2) as bar:
            for _ in range(3):
                bar.advance()
            with bar.aside():
                screen.file.write("an answer\n")
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert ("5/5" in shown and "pictures/s" in shown and "0:00:00" in shown) is terminal
        assert shown.startswith("an answer\n")


def test_a_url_is_named_without_its_password(edge: Terminal) -> None:
    url = "http://me:secret@127.0.0.1:9/a.png?size=1"
    code, _, err = edge("ask", "x", "-i", url, "--jsonl", "out.jsonl")
    assert code == 1 and "secret" not in err + Path("out.jsonl").read_text(encoding="utf-8")
    assert files() == ["http://127.0.0.1:9/a.png?size=1"]
