"""A bundle is read strictly, checked on load and written whole or not at all."""

import dataclasses
import json
import shutil

import pytest

from edgevlm import bundle as bundles
from edgevlm.bundle import MANIFEST, Component, Manifest, open_bundle, record, writing
from edgevlm.errors import BundleCorrupt, BundleError, BundleNotFound, BundleTooNew
from edgevlm.runtimes import fakes

FILES = {"vision": "vision.onnx", "projector": "projector.onnx", "decoder": "decoder.gguf"}


@pytest.fixture
def folder(tmp_path):
    """A sound bundle whose components hold arbitrary bytes."""
    root = tmp_path / "bundle"
    root.mkdir()
    components = {}
    for i, (name, file) in enumerate(FILES.items()):
        (root / file).write_bytes(bytes([i]) * 1000)
        components[name] = Component("f32", (record(root / file),))
    manifest = dataclasses.replace(fakes.vlm().manifest, components=components)
    bundles.write_manifest(root, manifest)
    return root


def edit(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_what_is_written_is_read(folder):
    bundle = open_bundle(folder, check="full")
    assert isinstance(bundle.manifest, Manifest)
    assert bundle.manifest.image == fakes.vlm().manifest.image
    assert bundle.path("decoder") == folder / "decoder.gguf"
    assert bundle.bytes == 3000


@pytest.fixture
def several(folder):
    """The same bundle with a second vision encoder of 500 bytes, qdq8."""
    path = folder / "vision.qdq8.onnx"
    path.write_bytes(b"q" * 500)
    other = dataclasses.asdict(Component("qdq8", (record(path),)))
    edit(folder, lambda m: m.update(alternatives={"qdq8": other}))
    return folder


def test_vision_encoders_are_found_by_precision(several):
    bundle = open_bundle(several, check="full")
    assert bundle.vision_precisions == ("f32", "qdq8")
    assert bundle.vision("f32") == bundle.path("vision") == several / "vision.onnx"
    assert bundle.vision("qdq8") == several / "vision.qdq8.onnx"
    assert bundle.bytes == 3500
    with pytest.raises(BundleError, match="has no fp16 vision encoder, only f32, qdq8"):
        bundle.vision("fp16")
    # What is read is what was written.
    bundles.write_manifest(several, bundle.manifest)
    assert open_bundle(several) == bundle


def test_a_bundle_from_before_alternatives_is_read(folder):
    edit(folder, lambda m: m.pop("alternatives"))
    assert open_bundle(folder).vision_precisions == ("f32",)


def test_a_damaged_alternative_is_named(several):
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
def test_a_wrong_alternative_is_refused(several, change, problem):
    edit(several, lambda m: m["alternatives"]["qdq8"].update(change))
    with pytest.raises(BundleCorrupt) as caught:
        open_bundle(several)
    assert problem in str(caught.value)


def test_an_alternative_is_another_precision_in_another_file(several):
    edit(several, lambda m: m["components"]["vision"].update(precision="qdq8"))
    with pytest.raises(BundleCorrupt, match="another qdq8"):
        open_bundle(several)
    edit(several, lambda m: m["components"]["vision"].update(precision="f32"))
    edit(several, lambda m: m["alternatives"]["qdq8"]["files"][0].update(file="vision.onnx"))
    with pytest.raises(BundleCorrupt, match="'vision.onnx' is named twice"):
        open_bundle(several)


def test_extra_norms_are_stated_and_false_where_a_manifest_is_silent(folder):
    manifest = open_bundle(folder).manifest
    decoder = dataclasses.replace(manifest.decoder, extra_norms=True)
    bundles.write_manifest(folder, dataclasses.replace(manifest, decoder=decoder))
    assert open_bundle(folder).manifest.decoder == decoder
    edit(folder, lambda data: data["decoder"].pop("extra_norms"))
    assert open_bundle(folder).manifest.decoder == manifest.decoder


@pytest.mark.parametrize("name", FILES.values())
def test_a_damaged_component_is_named(folder, name):
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


def test_large_files_are_sampled_on_load_and_hashed_in_full(folder, monkeypatch):
    monkeypatch.setattr(bundles, "WHOLE_BYTES", 100)
    monkeypatch.setattr(bundles, "BLOCK_BYTES", 4)
    path = folder / "decoder.gguf"
    edit(
        folder,
        lambda m: m["components"]["decoder"].update(files=[dataclasses.asdict(record(path))]),
    )
    for name in ("vision", "projector"):
        other = folder / FILES[name]
        edit(
            folder,
            lambda m, n=name, o=other: m["components"][n].update(
                files=[dataclasses.asdict(record(o))]
            ),
        )
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
def test_a_manifest_with_a_wrong_key_is_refused(folder, change, problem):
    edit(folder, change)
    with pytest.raises(BundleCorrupt, match=MANIFEST) as caught:
        open_bundle(folder)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "1"}', "\udcff"])
def test_a_manifest_that_is_no_json_object_is_refused(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleCorrupt):
        open_bundle(folder)


def test_a_newer_format_asks_for_an_upgrade(folder):
    edit(folder, lambda m: m.update(format=99, invention=True))
    with pytest.raises(BundleTooNew, match="format 99 is newer than 1.*upgrade"):
        open_bundle(folder)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleNotFound, match="no such bundle folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleNotFound, match="not a bundle"):
        open_bundle(tmp_path)


def test_writing_is_all_or_nothing(tmp_path):
    out = tmp_path / "new" / "model"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), writing(out) as part:
            (part / "half").write_text("x", encoding="utf-8")
            raise error
        assert list(tmp_path.rglob("*")) == [out.parent]
    with writing(out) as part:
        (part / "whole").write_text("x", encoding="utf-8")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["whole"]
    assert list(out.parent.iterdir()) == [out]


def test_writing_replaces_a_bundle_and_nothing_else(folder, tmp_path):
    with writing(folder) as part:
        (part / "new").write_text("x", encoding="utf-8")
    assert [p.name for p in folder.iterdir()] == ["new"]
    with pytest.raises(BundleError, match="exists and is not a bundle"), writing(folder):
        pass
    assert (folder / "new").exists()
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(BundleError, match="exists and is not a bundle"), writing(file):
        pass
    assert file.read_text(encoding="utf-8") == "precious"
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match="cannot be written"), writing(file / "below"):
        pass
