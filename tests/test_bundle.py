"""A bundle is read strictly, checked on load and written whole or not at all."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm import bundle as bundles
from edgevlm import family
from edgevlm.bundle import open_bundle, record, writing
from edgevlm.errors import (
    BundleCorrupt,
    BundleError,
    BundleNotFound,
    BundleTooNew,
    PromptError,
)
from edgevlm.manifest import (
    MANIFEST,
    Component,
    Manifest,
    WeightFileRecord,
    write_manifest,
)
from edgevlm.models import built_in
from edgevlm.runtimes import fakes

FILES = {"vision": "vision.onnx", "projector": "projector.onnx", "decoder": "decoder.gguf"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound bundle whose components hold arbitrary bytes."""
    root = tmp_path / "bundle"
    root.mkdir()
    components = {}
    for i, (name, file) in enumerate(FILES.items()):
        (root / file).write_bytes(bytes([i]) * 1000)
        components[name] = Component("f32", (record(root / file),))
    manifest = dataclasses.replace(fakes.vlm().manifest, components=components)
    write_manifest(root, manifest)
    return root


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_what_is_written_is_read(folder: Path) -> None:
    bundle = open_bundle(folder, check="full")
    assert isinstance(bundle.manifest, Manifest)
    assert bundle.manifest.image == fakes.vlm().manifest.image
    assert bundle.path("decoder") == folder / "decoder.gguf"
    assert bundle.bytes == 3000


def test_weight_files_are_the_manifests_pieces(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    eva = WeightFileRecord("eva", "eva_vit_g.pth", used=("norm.weight",))
    write_manifest(folder, dataclasses.replace(manifest, weight_files=(eva,)))
    (stored,) = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["pieces"]
    assert stored == {
        "piece": "eva",
        "file": "eva_vit_g.pth",
        "used": ["norm.weight"],
        "replaced": [],
        "unused": [],
    }
    assert open_bundle(folder).manifest.weight_files == (eva,)


@pytest.fixture
def several(folder: Path) -> Path:
    """The same bundle with a second vision encoder of 500 bytes, qdq8."""
    path = folder / "vision.qdq8.onnx"
    path.write_bytes(b"q" * 500)
    other = dataclasses.asdict(Component("qdq8", (record(path),)))
    edit(folder, lambda m: m.update(alternatives={"qdq8": other}))
    return folder


def test_vision_encoders_are_found_by_precision(several: Path) -> None:
    bundle = open_bundle(several, check="full")
    assert bundle.vision_precisions == ("f32", "qdq8")
    assert bundle.vision("f32") == bundle.path("vision") == several / "vision.onnx"
    assert bundle.vision("qdq8") == several / "vision.qdq8.onnx"
    assert bundle.bytes == 3500
    with pytest.raises(BundleError, match="has no fp16 vision encoder, only f32, qdq8"):
        bundle.vision("fp16")
    # What is read is what was written.
    write_manifest(several, bundle.manifest)
    assert open_bundle(several) == bundle


def test_a_bundle_from_before_alternatives_is_read(folder: Path) -> None:
    edit(folder, lambda m: m.pop("alternatives"))
    assert open_bundle(folder).vision_precisions == ("f32",)


@pytest.mark.fault("Bundles", "a further encoder that is damaged", "refused by the file's name")
def test_a_damaged_alternative_is_named(several: Path) -> None:
    path = several / "vision.qdq8.onnx"
    path.write_bytes(b"Q" + b"q" * 499)
    with pytest.raises(BundleCorrupt, match=r"vision.qdq8.onnx: was changed"):
        open_bundle(several)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"precision": "fp16"}, "'alternatives.qdq8' must be another qdq8"),
        ({"files": []}, "'alternatives.qdq8' must be another qdq8"),
        ({"colour": "red"}, "unknown key 'alternatives.qdq8.colour'"),
    ],
)
def test_a_wrong_alternative_is_refused(
    several: Path, change: dict[str, Any], problem: str
) -> None:
    edit(several, lambda m: m["alternatives"]["qdq8"].update(change))
    with pytest.raises(BundleCorrupt) as caught:
        open_bundle(several)
    assert problem in str(caught.value)


def test_an_alternative_is_another_precision_in_another_file(several: Path) -> None:
    edit(several, lambda m: m["components"]["vision"].update(precision="qdq8"))
    with pytest.raises(BundleCorrupt, match="another qdq8"):
        open_bundle(several)
    edit(several, lambda m: m["components"]["vision"].update(precision="f32"))
    edit(several, lambda m: m["alternatives"]["qdq8"]["files"][0].update(file="vision.onnx"))
    with pytest.raises(BundleCorrupt, match="'vision.onnx' is named twice"):
        open_bundle(several)


def test_extra_norms_are_stated_and_false_where_a_manifest_is_silent(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    decoder = dataclasses.replace(manifest.decoder, extra_norms=True)
    write_manifest(folder, dataclasses.replace(manifest, decoder=decoder))
    assert open_bundle(folder).manifest.decoder == decoder
    edit(folder, lambda data: data["decoder"].pop("extra_norms"))
    assert open_bundle(folder).manifest.decoder == manifest.decoder


@pytest.mark.fault(
    "Bundles",
    "a file cut short, longer, changed or gone",
    "refused by the file's name",
)
@pytest.mark.parametrize("name", FILES.values())
def test_a_damaged_component_is_named(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    for data, problem in (
        (whole[:-1], "truncated"),
        (whole + b"x", "longer"),
        (whole[:500] + b"x" + whole[501:], "changed"),
    ):
        path.write_bytes(data)
        with pytest.raises(BundleCorrupt, match=problem) as caught:
            open_bundle(folder)
        assert caught.value.file == path
        assert "export or download" in str(caught.value)
    path.unlink()
    with pytest.raises(BundleCorrupt, match=f"{name}: is missing"):
        open_bundle(folder)


def test_large_files_are_sampled_on_load_and_hashed_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "WHOLE_BYTES", 100)
    monkeypatch.setattr(bundles, "BLOCK_BYTES", 4)
    path = folder / "decoder.gguf"

    def record_anew(manifest: dict[str, Any]) -> None:
        for name, file in FILES.items():
            found = dataclasses.asdict(record(folder / file))
            manifest["components"][name].update(files=[found])

    edit(folder, record_anew)
    open_bundle(folder)
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    with pytest.raises(BundleCorrupt, match="changed"):
        open_bundle(folder)
    path.write_bytes(whole[:6] + b"x" + whole[7:])  # between two samples
    open_bundle(folder)
    with pytest.raises(BundleCorrupt, match="changed"):
        open_bundle(folder, check="full")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(colour="red"), "unknown key 'colour'"),
        (lambda m: m["image"].update(depth=3), "unknown key 'image.depth'"),
        (lambda m: m.pop("decoder"), "missing key 'decoder'"),
        (lambda m: m["image"].update(size="224"), "'image.size' has the wrong value '224'"),
        (lambda m: m["image"].update(size=True), "'image.size' has the wrong value"),
        (lambda m: m["image"].update(mean=[0.5]), "'image.mean' must have 3 items"),
        (lambda m: m["decoder"].update(attention="both"), "'decoder.attention'"),
        (lambda m: m["components"].pop("vision"), "'components' must be"),
        (lambda m: m["components"]["vision"].update(files=[]), "'components' must be"),
        (lambda m: m["components"]["vision"]["files"][0].update(file="../x"), "plain file name"),
        (lambda m: m.update(format=0), "never released"),
    ],
)
def test_a_manifest_with_a_wrong_key_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleCorrupt, match=MANIFEST) as caught:
        open_bundle(folder)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "1"}', "\udcff"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleCorrupt):
        open_bundle(folder)


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, lambda m: m.update(format=99, invention=True))
    with pytest.raises(BundleTooNew, match="format 99 is newer than 4.*upgrade"):
        open_bundle(folder)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no such bundle folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleNotFound, match="not a bundle"):
        open_bundle(tmp_path)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), writing(out) as part:
            (part / "half").write_text("x", encoding="utf-8")
            raise error
        assert list(tmp_path.rglob("*")) == []
    with writing(out) as part:
        (part / "whole").write_text("x", encoding="utf-8")
        assert not out.exists() and part.parent == out.parent
    assert [p.name for p in out.iterdir()] == ["whole"]
    assert list(out.parent.iterdir()) == [out]


def test_folders_above_stay_where_somebody_uses_them(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "new" / "model"):
        (tmp_path / "new" / "notes").write_text("x", encoding="utf-8")
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "notes"]


def test_writing_replaces_a_bundle_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with writing(folder) as part:
        (part / "edgevlm.json").write_text("x", encoding="utf-8")
        assert open_bundle(folder).manifest
    assert sorted(p.name for p in folder.iterdir()) == ["edgevlm.json", "notes.txt"]
    (folder / "edgevlm.json").unlink()
    with pytest.raises(BundleError, match=r"not a bundle \(it holds notes.txt\)"), writing(folder):
        pass
    assert (folder / "notes.txt").exists()


@pytest.fixture(params=["empty", "bundle", "current", "link", "link to a bundle", "root of a disk"])
def existing(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A folder that exists, as OUT names it, and the folder itself."""
    real = folder
    if "bundle" not in request.param:
        real = tmp_path / "real"
        real.mkdir()
    if request.param == "current":
        monkeypatch.chdir(real)
        return Path("."), real
    if request.param == "root of a disk":
        (real / "lost+found").mkdir()
    if "link" in request.param:
        (tmp_path / "link").symlink_to(real)
        return tmp_path / "link", real
    return real, real


def test_a_folder_that_exists_is_filled_and_not_replaced(
    existing: tuple[Path, Path], folder: Path
) -> None:
    out, real = existing
    kept, whole = real.stat().st_ino, {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(RuntimeError), writing(out) as part:
        before = sorted(p.name for p in real.iterdir() if p.name != part.name)
        (part / "half").write_text("x", encoding="utf-8")
        raise RuntimeError
    assert sorted(p.name for p in real.iterdir()) == before
    with writing(out) as part:
        for name, data in whole.items():
            (part / name).write_bytes(data)
    assert open_bundle(out, "full").folder == out
    assert real.stat().st_ino == kept
    assert {p.name for p in real.iterdir()} - {"lost+found"} == set(whole)


@pytest.mark.fault(
    "Bundles",
    "a file that cannot be moved while a bundle is replaced",
    "the old bundle stands, whole",
)
@pytest.mark.parametrize("error", [OSError(16, "busy"), KeyboardInterrupt()])
@pytest.mark.parametrize("last", range(8))
def test_a_bundle_that_cannot_be_replaced_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | KeyboardInterrupt, last: int
) -> None:
    """Four files go away and four come, whichever is the one that cannot be moved."""
    rename, moved = Path.rename, []

    def fails_at_last(path: Path, target: Path) -> None:
        rename(path, target)
        moved.append(path)
        if len(moved) > last:
            monkeypatch.undo()
            raise error

    with pytest.raises(type(error)), writing(folder) as part:
        for name in (MANIFEST, *FILES.values()):
            (part / name).write_text("new", encoding="utf-8")
        monkeypatch.setattr(Path, "rename", fails_at_last)
    assert sorted(p.name for p in folder.iterdir()) == sorted([MANIFEST, *FILES.values()])
    assert open_bundle(folder, "full")


def test_what_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for out, problem in (
        (file, "exists and is not a bundle"),
        (file / "below", "cannot be written (Not a directory)"),
        (tmp_path / "nowhere", "is a link to a folder that is not there"),
        (tmp_path / "none" / "..", "cannot be written (No such file or directory)"),
        (tmp_path / ("n" * 300), "cannot be written (File name too long)"),
        (tmp_path / os.fsdecode(b"caf\xe9"), "is not UTF-8"),
    ):
        with pytest.raises(BundleError) as caught, writing(out):
            pytest.fail("nothing may be computed")
        assert str(caught.value).startswith(f"{out}: ") and problem in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nowhere"]

    def refuses(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(BundleError, match="cannot be written .Permission denied."):
        writing(tmp_path / "out").__enter__()


def test_format_1_is_read_and_becomes_the_newest_when_it_is_written(folder: Path) -> None:
    edit(folder, lambda m: m.update(format=1))
    manifest = open_bundle(folder).manifest
    assert manifest == open_bundle(folder).manifest
    write_manifest(folder, manifest)
    assert json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["format"] == 2
    assert open_bundle(folder).manifest == manifest
    # All three components were compulsory.
    edit(folder, lambda m: (m.update(format=1), m["components"].pop("decoder")))
    with pytest.raises(BundleCorrupt, match="'components' must be of vision, projector, decoder"):
        open_bundle(folder)


def test_picos_manifest_is_read_as_format_1_had_it(tmp_path: Path) -> None:
    shutil.copytree(built_in(), tmp_path / "pico")
    edit(tmp_path / "pico", lambda m: (m.update(format=1), m.pop("self_check")))
    manifest = open_bundle(tmp_path / "pico").manifest
    assert {*manifest.components} == {"vision", "projector", "decoder"}
    assert manifest.self_check is None


DECODING = ("prompt", "decoder", "answer", "token_embedding")


def without_decoder(manifest: dict[str, Any]) -> None:
    del manifest["components"]["decoder"]
    for key in DECODING:
        del manifest[key]


def test_a_bundle_may_have_no_decoder(folder: Path) -> None:
    edit(folder, without_decoder)
    manifest = open_bundle(folder).manifest
    assert {*manifest.components} == {"vision", "projector"}
    write_manifest(folder, manifest)
    assert open_bundle(folder).manifest == manifest


@pytest.mark.parametrize("key", DECODING)
def test_a_decoder_is_described_whole(folder: Path, key: str) -> None:
    edit(folder, lambda m: m.pop(key))
    with pytest.raises(BundleCorrupt, match=f"missing key '{key}'"):
        open_bundle(folder)


@pytest.mark.parametrize("roles", [(), ("projector",), ("decoder", "projector"), ("vision",)])
def test_a_projector_and_a_vision_encoder_go_together(folder: Path, roles: tuple[str, ...]) -> None:
    edit(folder, lambda m: [m["components"].pop(r) for r in FILES if r not in roles])
    with pytest.raises(BundleCorrupt, match="'components' must be of"):
        open_bundle(folder)


def test_a_family_says_which_components_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built_in(), tmp_path / "eyes")
    edit(tmp_path / "eyes", lambda m: m.update(format=2))
    edit(tmp_path / "eyes", without_decoder)
    with pytest.raises(BundleCorrupt, match="has no decoder, which paligemma needs"):
        edgevlm.load(tmp_path / "eyes")
    able = dataclasses.replace(family.by_name("paligemma", ""), needs=("vision", "projector"))
    monkeypatch.setattr(family, "by_name", lambda *_: able)
    picture = np.full((10, 20, 3), (255, 0, 0), np.uint8)
    with edgevlm.load(tmp_path / "eyes", device="cpu") as eyes, edgevlm.load(device="cpu") as pico:
        assert np.array_equal(eyes.image_embeddings(picture), pico.image_embeddings(picture))
        assert eyes.devices.decoder.device == "none"
        with pytest.raises(PromptError, match="no decoder: it can embed pictures, not answer"):
            eyes.ask("caption en", picture)
