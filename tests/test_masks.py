"""Masks of objects: from their codes to pixels, JSON, COCO and a drawing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.coco import CocoSet, decoded, encoded
from edgevlm.drawing import draw
from edgevlm.errors import PromptError, SourceError
from edgevlm.export import export_bundle, masks, requantize_bundle
from edgevlm.manifest import write_manifest
from edgevlm.masks import in_picture, one_hot
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.types import Box
from tests.test_cli import Terminal, edge

pytestmark = pytest.mark.usefixtures("children_inside")
__all__ = ["edge"]

F32 = NDArray[np.float32]
CODES = np.random.default_rng(0).integers(0, 128, (3, 16))
SAID = "<loc0100><loc0200><loc0700><loc0900>" + "".join(f"<seg{i:03}>" for i in CODES[0]) + " cat"
FORCED = f'root ::= "{SAID}"'


def weights(path: Path, **changed: F32 | None) -> Path:
    """A file like vae-oid.npz with random values."""
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {
        name: (rng.standard_normal(shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.1)).astype(
            np.float32
        )
        for name, shape in masks.shapes().items()
    }
    values |= {"encoder.0.weight": np.zeros(3, np.float32)} | changed
    np.savez(path, **{name: v for name, v in values.items() if v is not None})
    return path


def conv(x: F32, w: F32, b: F32) -> F32:
    """A convolution [n, c, h, w] that keeps the size, by the definition."""
    pad = w.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))
    made: F32 = np.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None]
    return made


def grown(x: F32, w: F32, b: F32) -> F32:
    """A transposed convolution of stride 2: every value adds its kernel to what comes out."""
    n, _, height, width = x.shape
    out = np.zeros((n, w.shape[1], 2 * height + 2, 2 * width + 2), np.float32)
    for i in range(height):
        for j in range(width):
            out[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum(
                "nc,cokl->nokl", x[:, :, i, j], w
            )
    return out[:, :, 1:-1, 1:-1] + b[:, None, None]


def expected(path: Path, codes: NDArray[np.int64]) -> F32:
    """The masks [n, 64, 64], computed from the file's values."""
    v = np.load(path)

    def of(name: str) -> tuple[F32, F32]:
        return v[f"{name}.weight"], v[f"{name}.bias"]

    x = v["_vq_vae._embedding"][codes].reshape(-1, 4, 4, 512).transpose(0, 3, 1, 2)
    x = np.maximum(conv(x, *of("decoder.0")), 0)
    for block in ("decoder.2.net", "decoder.3.net"):
        y = np.maximum(conv(x, *of(f"{block}.0")), 0)
        y = np.maximum(conv(y, *of(f"{block}.2")), 0)
        x = x + conv(y, *of(f"{block}.4"))
    for name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
        x = np.maximum(grown(x, *of(name)), 0)
    found: F32 = conv(x, *of("decoder.12"))[:, 0]
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("vae") / "vae-oid.npz")


@pytest.fixture(scope="module")
def bundle(
    file: Path, paligemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "segmenting"
    export_bundle(
        paligemma_checkpoint,
        out,
        quant="f32",
        vision_precision="fp32",
        verify=False,
        segment_decoder=file,
    )
    return out


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as vlm:
        yield vlm


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_the_graph_computes_what_the_weights_say(file: Path, tmp_path: Path) -> None:
    path = masks.write(masks.read(file), tmp_path, None)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"codes": one_hot(CODES)})
    wanted = expected(file, CODES)
    assert found.shape == (3, 1, 64, 64)
    assert np.abs(found[:, 0] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_bundle_with_a_mask_decoder_segments(vlm: VLM, file: Path, picture: Path) -> None:
    (box,) = vlm.segment("cat", picture, grammar=FORCED)
    assert (box.label, box.segment) == ("cat", tuple(CODES[0]))
    assert box.mask is not None and box.mask.shape == (60, 80) and box.mask.any()
    wanted = in_picture(expected(file, CODES[:1])[0], box, 80, 60)
    assert (box.mask != wanted).mean() < 0.001  # a value next to zero may fall on either side


def test_a_mask_lies_in_its_box() -> None:
    square = np.full((64, 64), -1, np.float32)
    square[:, 32:] = 1
    mask = in_picture(square, Box(10.6, 5.2, 30.9, 25.9, "x"), 40, 30)
    assert mask[5:25, 20:30].all() and not mask[:, :19].any() and mask.sum() == 20 * 10
    assert not in_picture(square, Box(10, 5, 10.4, 25, "x"), 40, 30).any()  # no pixel wide
    assert in_picture(square, Box(-5, -5, 100, 100, "x"), 40, 30).shape == (30, 40)


def test_the_mask_decoder_is_kept_by_requantize(bundle: Path, tmp_path: Path) -> None:
    requantize_bundle(bundle, tmp_path / "small", vision_precision="fp16", verify=False)
    kept = open_bundle(tmp_path / "small", "full").manifest
    assert kept.components["masks"] == open_bundle(bundle).manifest.components["masks"]
    written = json.loads((tmp_path / "small" / "edgevlm.json").read_text(encoding="utf-8"))
    assert written["format"] == 4  # of the numbers that machines check themselves with
    older = replace(kept, self_check=None)
    write_manifest(tmp_path / "small", older)
    written = json.loads((tmp_path / "small" / "edgevlm.json").read_text(encoding="utf-8"))
    assert written["format"] == 3  # other bundles are then written in format 2


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"decoder.6.bias": None}, "has no decoder.6.bias"),
        ({"decoder.12.weight": np.zeros((2, 16, 1, 1), np.float32)}, "decoder.12.weight is float"),
        ({"decoder.0.bias": np.full(128, np.nan, np.float32)}, "decoder.0.bias holds NaN"),
    ],
)
def test_files_that_are_not_the_decoders(
    changed: dict[str, F32 | None], problem: str, paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    path = weights(tmp_path / "other.npz", **changed)
    with pytest.raises(SourceError, match=problem):
        export_bundle(paligemma_checkpoint, tmp_path / "out", segment_decoder=path)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_archives(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    for name in ("array.npy", "text.npz", "none.npz"):
        with pytest.raises(SourceError, match=f"{name}: cannot be read as an npz file"):
            export_bundle(paligemma_checkpoint, tmp_path / "o", segment_decoder=tmp_path / name)


def test_models_that_say_no_masks(smolvlm_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no task 'segment'"):
        export_bundle(smolvlm_checkpoint, tmp_path / "out", segment_decoder=file)


def test_coco_and_drawings_have_the_masks() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2] = True
    boxes = [Box(2, 1, 3, 3, "cat", mask=mask), Box(4, 3, 0, 0, "dog"), Box(0, 0, 1, 1, "cat")]
    whole = CocoSet()
    whole.add("a.png", 5, 4, boxes)
    found = whole.as_dict()
    first, second, _ = found["annotations"]
    assert first["segmentation"] == {"counts": [9, 2, 9], "size": [4, 5]}
    assert (first["bbox"], first["area"]) == ([2, 1, 1, 2], 2)
    assert (second["bbox"], second["area"], second["category_id"]) == ([0, 0, 4, 3], 12, 2)
    assert "segmentation" not in second
    assert found["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for one in (mask, ~mask, np.ones((2, 3), bool), np.zeros((3, 2), bool)):
        assert sum(encoded(one)["counts"]) == one.size
        assert np.array_equal(decoded(encoded(one)), one)
    assert encoded(np.ones((2, 2), bool))["counts"] == [0, 4]
    grey = np.full((200, 200, 3), 100, np.uint8)
    inside = np.zeros((200, 200), bool)
    inside[90:110, 90:110] = True
    drawn = np.asarray(draw(grey, [Box(50, 50, 150, 150, "cat", mask=inside)]))
    assert drawn[100, 100].tolist() == [165, 130, 50] and drawn[70, 70].tolist() == [100] * 3


def test_the_command_line_segments(
    edge: Terminal, vlm: VLM, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = vlm.ask
    monkeypatch.setattr(vlm, "ask", lambda *a, **k: ask(*a, grammar=FORCED, **k))
    monkeypatch.setattr(vlm, "close", lambda: None)
    monkeypatch.setattr(edgevlm, "load", lambda *_, **__: vlm)
    out_file = tmp_path / "out.png"
    code, out, err = edge("segment", "cat", "-m", "x", "-i", picture, "--json", "--out", out_file)
    assert (code, err) == (0, "") and out_file.exists()
    (found,) = json.loads(out)["boxes"]
    assert sum(found["mask"]["counts"]) == 60 * 80 and found["mask"]["size"] == [60, 80]
    (annotation,) = json.loads(edge("segment", "cat", "-i", picture, "--coco")[1])["annotations"]
    assert annotation["segmentation"] == found["mask"]
    assert edge("segment", "cat", "-i", picture)[1] == "cat\t16 6 70 41\n"
    code, _, err = edge("segment", "cat", "-i", picture, "--coco", "--json")
    assert code == 2 and "choose one" in err


def test_without_a_mask_decoder_there_are_boxes_and_a_note(edge: Terminal, picture: Path) -> None:
    edge.says(SAID)
    code, out, err = edge("segment", "cat", "-m", "x", "-i", picture)
    assert (code, out) == (0, "cat\t16 6 70 41\n")
    assert err.count("\n") == 1 and "Boxes without masks" in err and "--segment-decoder" in err
    assert fakes.vlm(SAID).segment("cat", picture)[0].mask is None


def test_tasks_that_a_model_lacks(picture: Path) -> None:
    vlm = fakes.vlm("it is red")
    with pytest.raises(PromptError, match="no task 'ground'"):
        vlm.ground(picture)
    # Without a prompt for questions the question is the prompt.
    assert vlm.answer("which colour?", picture).tokens.text == 1 + len("which colour?\n")
