"""The index of a folder of pictures, and the command that searches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import DualEncoder, PhotoIndex, cli
from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.export import export_bundle
from edgevlm.photos.groups import groups
from tests.checkpoints.dual import clip_config, write_clip

Run = Callable[..., tuple[Any, str, str]]
COLOURS = (
    (250, 10, 10),
    (10, 250, 10),
    (10, 10, 250),
    (240, 240, 20),
    (20, 20, 20),
    (250, 250, 250),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    options: dict[str, Any] = {"vision_precision": "fp32", "verify": False}
    export_bundle(write_clip(root / "checkpoint"), root / "clip", **options)
    other = clip_config(projection_dim=16)
    export_bundle(write_clip(root / "other", config=other), root / "narrow", **options)
    return root / "clip"


@pytest.fixture
def model(bundle: Path) -> Iterator[DualEncoder]:
    with edgevlm.load_dual(bundle) as loaded:
        yield loaded


def paint(path: Path, seed: int) -> Path:
    """A picture of its own: noise of a colour."""
    rng = np.random.default_rng(seed)
    colour = np.array(COLOURS[seed % len(COLOURS)])
    pixels = np.clip(colour + rng.normal(0, 60, (40, 50, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "b.bmp", "in/c.webp", "in/deep/d.tiff", "e.jpg", "f.gif")):
        paint(tmp_path / "album" / name, i)
    paint(tmp_path / "album" / ".hidden.png", 9)
    (tmp_path / "album" / "notes.txt").write_text("no picture", encoding="utf-8")
    return tmp_path / "album"


@pytest.fixture
def index(folder: Path, model: DualEncoder, tmp_path: Path) -> Iterator[PhotoIndex]:
    with PhotoIndex(folder, model, path=tmp_path / "index.sqlite") as made:
        yield made


def test_every_picture_finds_itself_first(index: PhotoIndex, folder: Path) -> None:
    counted: list[tuple[int, int]] = []
    update = index.update(lambda p: counted.append((p.done, p.total)))
    assert (update.total, update.added, update.failures) == (6, 6, {})
    assert counted[-1] == (6, 6) and [done for done, _ in counted] == sorted(d for d, _ in counted)
    for path in (folder / "a.png", folder / "in" / "deep" / "d.tiff", folder / "e.jpg"):
        found = index.similar(path, limit=3)
        assert found[0].file == path and found[0].score == pytest.approx(1, abs=1e-5)
        assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    assert len(index.search("a red circle", limit=50)) == 6
    assert index.search("a red circle", limit=2) == index.search("a red circle")[:2]


def test_only_what_changed_is_read_again(
    index: PhotoIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.update()
    read: list[str] = []
    plain = DualEncoder.pixels

    def noted(self: DualEncoder, image: Any) -> Any:
        read.append(Path(image).name)
        return plain(self, image)

    monkeypatch.setattr(DualEncoder, "pixels", noted)
    assert index.update().added == 0
    (folder / "a.png").rename(folder / "in" / "moved.png")
    (folder / "b.bmp").unlink()
    os.utime(folder / "e.jpg", (1, 1))
    paint(folder / "f.gif", 77)
    (folder / "copy.webp").write_bytes((folder / "in" / "c.webp").read_bytes())
    update = index.update()
    assert read == ["f.gif"]
    assert (update.total, update.added, update.moved, update.removed) == (6, 1, 1, 2)
    names = {found.file.name for found in index.search("x", limit=50)}
    assert names == {"moved.png", "c.webp", "copy.webp", "d.tiff", "e.jpg", "f.gif"}
    assert index.similar(folder / "in" / "moved.png", 1)[0].file.name == "moved.png"
    assert index.similar(folder / "f.gif", 1)[0].file.name == "f.gif"


def test_loose_rows_are_dropped_from_the_file(index: PhotoIndex, folder: Path) -> None:
    for i in range(40):
        paint(folder / f"many{i}.png", i)
    index.update()
    before = index.path.stat().st_size
    for i in range(35):
        (folder / f"many{i}.png").unlink()
    index.update()
    assert index.path.stat().st_size < before
    assert index._store.rows().shape == (11, 24)
    for path in (folder / "many37.png", folder / "e.jpg"):
        assert index.similar(path, 1)[0].file == path


def test_a_broken_picture_is_named_and_not_tried_again(index: PhotoIndex, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "odd\udcff.png").write_bytes((folder / "a.png").read_bytes())
    update = index.update()
    assert update.total == 7
    assert [path.name for path in update.failures] == ["broken.png"]
    assert "not a picture" in update.failures[folder / "broken.png"]
    again = index.update()
    assert again.added == 0 and again.failures == update.failures
    paint(folder / "broken.png", 3)
    assert index.update().failures == {}


@pytest.mark.fault(
    "Pictures", "a folder within an indexed one that cannot be read", "named; its pictures stay"
)
def test_a_folder_that_cannot_be_read_is_named_and_its_pictures_stay(
    index: PhotoIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(folder / "inside" / "deep" / "1.png", 30)
    paint(folder / "inside.png", 31)
    before = index.update().total
    scandir = os.scandir

    def refused(path: bytes) -> Any:
        if os.path.basename(path) == b"inside":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    (folder / "inside.png").unlink()
    update = index.update()
    assert (update.total, update.removed) == (before - 1, 1)
    assert update.failures == {folder / "inside": "cannot be read (Permission denied)"}
    monkeypatch.undo()
    assert not index.update().failures


def test_a_picture_is_upright_as_its_exif_says(index: PhotoIndex, folder: Path) -> None:
    with Image.open(folder / "a.png") as upright:
        exif = upright.getexif()
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    index.update()
    found = index.similar(folder / "a.png", 2)
    assert {f.file.name for f in found} == {"a.png", "turned.png"}
    assert found[1].score == pytest.approx(1, abs=1e-5)
    ((first, second),) = index.duplicates(0.999)
    assert {first.file.name, second.file.name} == {"a.png", "turned.png"}


def test_groups_are_linked_and_the_largest_comes_first() -> None:
    rows = np.zeros((600, 3), np.float32)
    rows[:, 0] = 1
    rows[10] = rows[590] = (0, 1, 0)
    rows[20] = (0, 0, 1)
    counted: list[int] = []
    found = groups(rows, 0.9, counted.append)
    assert [len(group) for group in found] == [597, 2] and found[1] == [10, 590]
    assert sum(counted) == 600


def test_another_model_or_file_and_another_process_are_refused(
    index: PhotoIndex, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    index.update()
    with edgevlm.load_dual(bundle.with_name("narrow")) as narrow:
        with pytest.raises(EdgeVLMError, match="was made with another model"):
            PhotoIndex(folder, narrow, path=index.path)
        (tmp_path / "text").write_text("something else" * 99, encoding="utf-8")
        with pytest.raises(EdgeVLMError, match="is not an index that can be used"):
            PhotoIndex(folder, narrow, path=tmp_path / "text")
        with PhotoIndex(tmp_path / "nowhere", narrow, path=tmp_path / "n") as nowhere:
            with pytest.raises(ImageError, match="no such folder"):
                nowhere.update()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    bundle: Path,
) -> Run:
    monkeypatch.setenv("EDGEVLM_MODEL", str(bundle))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def called(*arguments: object) -> tuple[Any, str, str]:
        given = ["edgevlm", "search", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return called


def test_search_prints_the_best_first(run: Run, folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, out, err = run("a red circle", folder, "--index", tmp_path / "i", "--sheet", sheet)
    assert code == 0 and "6 pictures indexed: 6 new." in err
    scores = [float(line.split()[0]) for line in out.splitlines()]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    with Image.open(sheet) as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 24) or ()) > 500
    code, out, err = run("a red circle", folder, "--index", tmp_path / "i", "--json", "-n", 5)
    found = json.loads(out)
    assert (code, err, len(found)) == (0, "", 5)
    assert [f["score"] for f in found] == pytest.approx(scores[:5], abs=1e-4)
    assert Path(found[0]["file"]).is_file()
    _, out, _ = run("-i", folder / "e.jpg", folder, "--index", tmp_path / "i", "--json")
    assert json.loads(out)[0] == {"file": str(folder / "e.jpg"), "score": pytest.approx(1)}


def test_near_duplicates_are_groups(run: Run, folder: Path, tmp_path: Path) -> None:
    with Image.open(folder / "a.png") as picture:
        picture.save(folder / "again.jpg", quality=95)
    code, out, _ = run(folder, "--index", tmp_path / "i", "--duplicates", "--json")
    groups = [{Path(p["file"]).name for p in group} for group in json.loads(out)]
    assert code == 0 and {"a.png", "again.jpg"} in groups


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("a", "b", "."), 2, "one QUERY, one picture"),
        (("a", ".", "-i", "x.png"), 2, "one QUERY, one picture"),
        ((".", "--sheet", "x.png"), 2, "--sheet draws what was found"),
        (("a", ".", "--sheet", "x.txt"), 2, "x.txt"),
        (("a", "nowhere"), 1, "nowhere: no such folder"),
    ],
)
def test_wrong_usage_is_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    ended, out, err = run(*arguments, "--index", tmp_path / "i")
    assert (ended, out) == (code, "") and reason in err and err.count("\n") == 1


def test_a_killed_index_goes_on_where_it_was(
    bundle: Path, tmp_path: Path, model: DualEncoder
) -> None:
    folder, path = tmp_path / "many", tmp_path / "index.sqlite"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (700, 9, 7, 3), np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.bmp")
    command = [sys.executable, "-m", "edgevlm", "search", str(folder), "-m", str(bundle)]
    child = subprocess.Popen([*command, "--index", str(path)], stderr=subprocess.DEVNULL)
    with PhotoIndex(folder, model, path=path) as index:
        while not len(index) and child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        before = len(index)
        assert before % 64 == 0
        update = index.update()
        assert (update.total, update.added) == (700, 700 - before)
        assert index.similar(folder / "699.bmp", 1)[0].file.name == "699.bmp"
