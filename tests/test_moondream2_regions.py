"""Moondream2's region model: boxes and points, against its own code written out."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgevlm
from edgevlm import Box, Point
from edgevlm.bundle import REGION_ROWS, REGIONS, open_bundle
from edgevlm.errors import BundleCorrupt, EngineError, PromptError, SourceError
from edgevlm.export import export_bundle, inspect_source, requantize_bundle
from edgevlm.export.onnx import storage
from edgevlm.manifest import MANIFEST
from edgevlm.runtimes.session import VLM
from tests.checkpoints.moondream2 import starmie, templates, write_moondream2
from tests.inside import edgevlm as edgevlm_

pytestmark = pytest.mark.usefixtures("children_inside")

PICTURE = np.random.default_rng(7).integers(0, 256, (150, 200, 3), np.uint8)
N_BINS = 64


class Original:
    """The region model as moondream.py and region.py have it."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references.moondream2 import Reference
        from edgevlm.export.pipeline import read

        self.reference = Reference(read(folder))

    def found(
        self, picture: NDArray[np.uint8], ids: list[int], most: int, *, sized: bool, end: int = 0
    ) -> tuple[list[tuple[float, ...]], list[int]]:
        """Objects in shares of the sides, and the likeliest token before each and after all."""
        import torch

        reference = self.reference
        with torch.inference_mode():
            pixels, tiling = reference.crops(picture)
            seen = reference.project(reference.features(pixels), tiling)
            rows = torch.cat([reference.embedded([0]), seen, reference.embedded(ids)])
            out: list[tuple[float, ...]] = []
            tokens: list[int] = []

            def last() -> torch.Tensor:
                hidden: torch.Tensor = reference.hidden(rows, len(seen) + 1)[-1]
                return hidden

            while True:
                hidden = last()
                tokens.append(int(reference.head(hidden).argmax()))
                if tokens[-1] == end or len(out) == most:
                    return out, tokens
                x = int(self.bins("coord", hidden).argmax()) / N_BINS
                rows = torch.cat([rows, self.row("coord", [x])])
                y = int(self.bins("coord", last()).argmax()) / N_BINS
                rows = torch.cat([rows, self.row("coord", [y])])
                if not sized:
                    out.append((x, y))
                    continue
                sizes = self.bins("size", last()).view(2, -1).argmax(-1).float()
                w, h = torch.pow(2.0, sizes / (N_BINS - 1) * 10.0 - 10.0).tolist()
                rows = torch.cat([rows, self.row("size", [w, h])])
                out.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))

    def bins(self, kind: str, hidden: Any) -> Any:
        """Logits of bins."""
        return self.reference.mlp(f"region.{kind}_decoder", hidden)

    def row(self, kind: str, values: list[float]) -> Any:
        """The row [1, n_embd] of a place or a size."""
        import torch

        angles = (
            2 * torch.pi * torch.tensor([values]) @ self.reference.weight(f"region.{kind}_features")
        )
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.reference.linear(f"region.{kind}_encoder", waves)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moondream2(tmp_path_factory.mktemp("regions") / "source")


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32", verify=False)
    return made.folder


@pytest.fixture
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, threads=1) as loaded:
        yield loaded


def asked(task: str, name: str) -> list[int]:
    """The template of a task about an object, whose name follows a space."""
    template = templates()[task]
    return [*template["prefix"], *starmie().encode(f" {name}").ids, *template["suffix"]]


def corners(box: Box) -> tuple[float, ...]:
    """In shares of the picture's sides."""
    return box.normalized(200, 150)


@pytest.mark.parametrize("name", ["cat", "red circle"])
def test_boxes_are_the_originals(vlm: VLM, original: Original, name: str) -> None:
    theirs, _ = original.found(PICTURE, asked("detect", name), 5, sized=True)
    reply = vlm.ask(vlm.task("detect", name), PICTURE, max_tokens=15)
    np.testing.assert_allclose([corners(box) for box in reply.boxes], theirs, atol=1e-6)
    assert len({*theirs}) > 1 and {box.label for box in reply.boxes} == {name}
    assert reply.tokens.generated == 15 and reply.finish_reason == "length"
    assert reply.tokens.text == 1 + len(asked("detect", name)) and not reply.token_ids


@pytest.mark.parametrize("name", ["cat", "red circle"])
def test_points_are_the_originals(vlm: VLM, original: Original, name: str) -> None:
    theirs, _ = original.found(PICTURE, asked("point", name), 5, sized=False)
    points = vlm.point(name, PICTURE, max_tokens=10)
    np.testing.assert_allclose([p.normalized(200, 150) for p in points], theirs, atol=1e-6)
    assert len({*theirs}) > 1 and points[0] == Point(theirs[0][0] * 200, theirs[0][1] * 150, name)


def test_bins_and_rows_are_the_originals(vlm: VLM, original: Original) -> None:
    import torch

    regions = vlm.engines.regions
    assert regions
    hidden = np.random.default_rng(1).standard_normal(256, np.float32) * 3
    theirs = [original.bins(kind, torch.from_numpy(hidden)) for kind in ("coord", "size")]
    np.testing.assert_allclose(regions.bins(hidden), np.concatenate(theirs), atol=1e-4)
    rows = regions.rows(0.25, 0.5, 0.125)
    expected = [original.row("coord", [0.25]), original.row("size", [0.5, 0.125])]
    np.testing.assert_allclose(rows, np.concatenate(expected), atol=1e-4)


def test_it_ends_where_the_end_token_is_the_likeliest(vlm: VLM, original: Original) -> None:
    ids = asked("point", "cat")
    _, tokens = original.found(PICTURE, ids, 4, sized=False)
    end = tokens[2]
    before = tokens.index(end)
    theirs, _ = original.found(PICTURE, ids, 4, sized=False, end=end)
    spec = vlm.manifest.regions
    assert spec and len(theirs) == before
    regions = dataclasses.replace(spec, end=end)
    vlm.engines = dataclasses.replace(
        vlm.engines, manifest=dataclasses.replace(vlm.manifest, regions=regions)
    )
    reply = vlm.ask(vlm.task("point", "cat"), PICTURE)
    assert (len(reply.points), reply.finish_reason) == (before, "stop")
    other = dataclasses.replace(vlm.manifest, regions=dataclasses.replace(spec, size_bins=32))
    vlm.engines = dataclasses.replace(vlm.engines, manifest=other)
    with pytest.raises(EngineError, match="the region model has 192 bins, not the manifest's"):
        vlm.point("cat", PICTURE)


def test_without_a_bound_there_are_as_many_as_the_original_looks_for(vlm: VLM) -> None:
    reply = vlm.ask(vlm.task("point", "cat"), PICTURE)
    assert (len(reply.points), reply.finish_reason) == (50, "stop")
    assert len(vlm.detect("cat", PICTURE)) == 50


def test_several_names_are_looked_for_in_turn_and_the_picture_is_kept(
    vlm: VLM, bundle: Path
) -> None:
    alone = [vlm.detect(name, PICTURE, max_tokens=6) for name in ("cat", "dog")]
    reply = vlm.ask(vlm.task("detect", ["cat", "dog"]), PICTURE, max_tokens=6)
    assert list(reply.boxes) == [*alone[0], *alone[1]]
    assert reply.tokens.kept == 26  # the begin token and the picture
    question = vlm.ask("what?", PICTURE, max_tokens=4)
    with edgevlm.load(bundle, threads=1) as fresh:
        assert fresh.ask("what?", PICTURE, max_tokens=4).token_ids == question.token_ids


def test_it_streams_an_object_at_a_time_and_can_be_cancelled(vlm: VLM) -> None:
    answer = vlm.stream(vlm.task("point", "cat"), PICTURE, max_tokens=8)
    texts = [piece.text for piece in answer if piece.text]
    assert len(texts) == 4 and "".join(texts) == answer.reply.text
    assert [text.strip("\n").split("\t")[0] for text in texts] == ["cat"] * 4
    again = vlm.stream(vlm.task("point", ["cat", "dog"]), PICTURE)
    for _ in again:
        again.cancel()
    assert (again.reply.finish_reason, len(again.reply.points)) == ("cancelled", 1)
    assert vlm.point("cat", PICTURE, max_tokens=8) == list(answer.reply.points)


def test_a_search_that_is_left_disturbs_nobody(vlm: VLM) -> None:
    alone = vlm.ask("what?", PICTURE, max_tokens=4).token_ids
    left = vlm.stream(vlm.task("point", "cat"), PICTURE)
    next(left)
    assert vlm.ask("what?", PICTURE, max_tokens=4).token_ids == alone
    del left
    assert vlm.ask("what?", PICTURE, max_tokens=4).token_ids == alone
    assert vlm.detect("cat", PICTURE, max_tokens=3) == vlm.detect("cat", PICTURE, max_tokens=3)


def test_a_decoder_that_draws_apart_finds_the_same(bundle: Path, tmp_path: Path) -> None:
    made = requantize_bundle(bundle, tmp_path / "q8", quant="q8_0", verify=False)
    assert {REGIONS, REGION_ROWS} <= {p.name for p in made.folder.iterdir()}
    found = []
    for repack in (False, "decode"):
        with edgevlm.load(made.folder, threads=1, repack=repack) as vlm:
            found.append(vlm.point("cat", PICTURE, max_tokens=6))
    assert len(found[0]) == len(found[1]) == 3 and found[0][0] == found[1][0]


def test_weights_that_lie_beside_their_graphs_belong_to_the_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do in a model of the real size, whose region model has 235 MB."""
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 0)
    out = tmp_path / "made"
    export_bundle(checkpoint, out, quant="f32", vision_precision="fp32", verify=False)
    requantize_bundle(out, tmp_path / "q8", quant="q8_0", verify=False)
    for made in (out, tmp_path / "q8"):
        opened = open_bundle(made)
        assert opened.names == {path.name for path in made.iterdir()} - {MANIFEST, "README.md"}
        assert {f"{REGIONS}.data", f"{REGION_ROWS}.data"} <= opened.names
    with edgevlm.load(bundle, threads=1) as whole, edgevlm.load(out, threads=1) as parted:
        assert parted.point("cat", PICTURE) == whole.point("cat", PICTURE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.5}, "detect takes the likeliest places .* leave out temperature"),
        ({"logprobs": 2}, "leave out logprobs"),
        ({"choices": ["a"]}, "leave out choices"),
        ({"schema": {"type": "object"}}, "leave out schema"),
        ({"stop": "x"}, "leave out stop"),
    ],
)
def test_options_that_it_cannot_follow_are_refused(
    vlm: VLM, options: dict[str, object], says: str
) -> None:
    with pytest.raises(PromptError, match=says):
        vlm.detect("cat", PICTURE, **options)  # type: ignore[arg-type]


def test_what_cannot_be_looked_for_is_refused(vlm: VLM) -> None:
    for nothing in ("", " ", [], ["cat", ""]):
        with pytest.raises(PromptError, match="needs names of objects, none of them empty"):
            vlm.point(nothing, PICTURE)
    with pytest.raises(PromptError, match="the task 'point' is about a picture; give one"):
        vlm.point("cat", None)
    with edgevlm.load() as pico, pytest.raises(PromptError, match="this model has no task 'point'"):
        pico.point("cat", PICTURE)


def test_a_point_prints_pickles_and_shows(vlm: VLM) -> None:
    reply = vlm.ask(vlm.task("point", "cat"), Image.fromarray(PICTURE), max_tokens=4)
    point = reply.points[0]
    assert repr(point) == f"<Point 'cat' {point.x:.0f} {point.y:.0f}>"
    assert pickle.loads(pickle.dumps(reply)) == reply
    assert "<img" in reply._repr_html_() and "&lt;Point" in point._repr_html_()
    assert "2 points" in repr(reply)
    assert json.loads(json.dumps(dataclasses.asdict(point)))["label"] == "cat"


def test_a_bundle_without_a_file_of_it_is_refused(bundle: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    path = broken / "edgevlm.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["regions"]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="'regions' must stand beside a component"):
        edgevlm.load(broken)
    (broken / REGION_ROWS).unlink()
    with pytest.raises(BundleCorrupt):
        edgevlm.load(broken)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "a.png"
    Image.fromarray(PICTURE).save(path)
    return path


def test_the_command_points(vlm: VLM, bundle: Path, photo: Path, tmp_path: Path) -> None:
    points = vlm.point("cat", PICTURE, max_tokens=4)
    about = ("-m", str(bundle), "-i", str(photo), "--max-tokens", "4")
    done = edgevlm_("point", "cat", *about, "-o", str(tmp_path / "points.png"))
    lines = [f"cat\t{p.x:.0f} {p.y:.0f}" for p in points]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines)
    assert done.stderr == "Cut at 4 tokens; --max-tokens raises the limit.\n"
    drawn = np.array(Image.open(tmp_path / "points.png"))
    assert drawn.shape == PICTURE.shape and (drawn != PICTURE).any()
    found = json.loads(edgevlm_("point", "cat", *about, "--json").stdout)
    assert (found["width"], found["height"], len(found["points"])) == (200, 150, 2)
    assert found["points"][0] == {
        "x": points[0].x,
        "y": points[0].y,
        "label": "cat",
        "normalized": [round(share, 6) for share in points[0].normalized(200, 150)],
    }
    assert "boxes" not in found


def test_the_command_points_in_many_pictures(bundle: Path, photo: Path, tmp_path: Path) -> None:
    Image.fromarray(PICTURE[:, ::-1]).save(photo.with_name("b.png"))
    out = tmp_path / "points.jsonl"
    about = ("-m", str(bundle), "-i", str(photo.parent), "--max-tokens", "2")
    done = edgevlm_("point", "cat", "dog", *about, "--jsonl", str(out))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [len(record["points"]) for record in records] == [2, 2]
    assert {record["prompt"] for record in records} == {"point cat ; dog"}
    shown = edgevlm_("point", "cat", "dog", *about).stdout.splitlines()
    assert len(shown) == 4 and all(line.startswith(str(photo.parent)) for line in shown)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ("point", "cat", "-m", "pico", "-i", "{photo}"),
            1,
            "this model has no task 'point'; it has",
        ),
        (
            ("caption", "--length", "short", "-m", "pico", "-i", "{photo}"),
            1,
            "no task 'caption_short'",
        ),
        (("point", "-i", "{photo}"), 2, "Missing argument"),
        (("point", "cat"), 2, "name a picture with -i"),
        (("point", "cat", "--coco", "-i", "{photo}"), 2, "No such option"),
        (("point", "cat", "-i", "{photo}", "--each", "-o", "b.png"), 2, "--json has the points"),
    ],
)
def test_commands_that_cannot_be_done_are_one_line(
    arguments: tuple[str, ...], code: int, says: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)
    monkeypatch.setenv("EDGEVLM_HOME", str(photo.parent.parent / "home"))
    done = edgevlm_(*(word.format(photo=photo) for word in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ({"dim": 128}, "config.region.dim is 128, config.text.dim 256"),
        ({"coord_feat_dim": 15}, "coord_feat_dim is 15, not an even number"),
        ({"size_out_dim": 2}, "size_out_dim is 2, not an even number from 4 on"),
        ({"bins": 2}, "config.region.bins is not known"),
        ({"coord_out_dim": 32}, r"config.json says \[32"),
    ],
)
def test_another_region_model_is_refused(region: dict[str, int], says: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_moondream2(tmp_path / "source", sections={"region": region}))
