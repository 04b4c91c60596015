"""Pictures in their own size: plans against transformers', and what is made of boxes in them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgevlm
from edgevlm.boxes import parse_qwen
from edgevlm.bundle import open_bundle
from edgevlm.cli import cli
from edgevlm.cli.models import picture_text
from edgevlm.errors import BundleCorrupt, ImageError, PromptError
from edgevlm.export import export_bundle
from edgevlm.image.plan import limited, measured_side, plan
from edgevlm.manifest import MANIFEST, write_manifest
from edgevlm.runtimes.budget import needs
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.specs import ImageSpec, NativeSpec
from tests.checkpoints.qwen2_vl import write_qwen2_vl

pytestmark = pytest.mark.usefixtures("children_inside")

HALF = (0.5, 0.5, 0.5)
PUBLISHED = ImageSpec(28, 1, HALF, HALF, native=NativeSpec(3136, 12845056))
USUAL = limited(PUBLISHED, max_pixels=1280 * 784)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    source = write_qwen2_vl(folder / "source", new=True)
    made = export_bundle(source, folder / "out", quant="f16", verify=False)
    return made.folder


@pytest.mark.parametrize("spec", [PUBLISHED, USUAL, limited(PUBLISHED, max_pixels=1)])
def test_sizes_are_the_originals(spec: ImageSpec) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    resize: Any = smart_resize
    rng, seen = random.Random(1), 0
    assert spec.native
    most = spec.native.max_pixels or spec.native.most
    for _ in range(5000):
        width, height = (int(10 ** rng.uniform(0, 4)) for _ in range(2))
        try:
            expected = resize(height, width, 28, spec.native.least, most)
        except ValueError:
            with pytest.raises(ImageError, match="too long and narrow"):
                plan(width, height, spec)
            continue
        found = plan(width, height, spec)
        assert found.canvas[::-1] == expected
        assert found.cells == (expected[0] // 28, expected[1] // 28)
        assert found.rows == expected[0] * expected[1] // 784 and found.n_tiles == 1
        seen += 1
    assert seen > 4000


def test_bounds_go_no_further_than_the_checkpoints() -> None:
    assert plan(4000, 3000, USUAL).rows <= 1280 < plan(4000, 3000, PUBLISHED).rows
    assert plan(9000, 9000, limited(PUBLISHED, max_pixels=10**9)).rows <= 16384
    assert limited(PUBLISHED) == PUBLISHED == limited(PUBLISHED, max_tiles=1)
    assert (measured_side(USUAL), measured_side(limited(PUBLISHED, max_pixels=1))) == (448, 28)
    said = picture_text(USUAL)
    assert "squares of 28 px, 1003520 px in all at most (--max-pixels up to 12845056)" in said
    assert "--max-pixels" not in picture_text(PUBLISHED)


def test_what_is_no_bound_is_refused(bundle: Path) -> None:
    with pytest.raises(PromptError, match="max_pixels must be at least 1"):
        edgevlm.load(bundle, max_pixels=0)
    result = CliRunner().invoke(cli, ["ask", "-m", str(bundle), "--max-pixels", "0", "x"])
    assert result.exit_code == 2 and "--max-pixels" in result.output


def test_memory_is_that_of_a_photo(bundle: Path) -> None:
    small = open_bundle(bundle)
    large = replace(small, manifest=replace(small.manifest, image=USUAL))
    assert needs(large, "int8", "f16").vision > needs(small, "int8", "f16").vision


def test_a_decoder_with_other_positions_is_refused(bundle: Path, tmp_path: Path) -> None:
    """llama.cpp would read behind the positions that it was given."""
    manifest = open_bundle(bundle).manifest
    other = replace(manifest.decoder, positions="sequential")
    for file in bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / MANIFEST).unlink()
    write_manifest(tmp_path, replace(manifest, decoder=other))
    with pytest.raises(BundleCorrupt, match="positions are not 'sequential'"):
        edgevlm.load(tmp_path)


def test_rows_without_places_are_refused(bundle: Path) -> None:
    from edgevlm.errors import EngineError
    from edgevlm.runtimes.engines import Block, following, sequential

    with edgevlm.load(bundle) as vlm:
        decoder = vlm.engines.decoder
        assert isinstance(decoder, LlamaDecoder)
        rows = decoder.embed([5, 6, 7])
        with pytest.raises(EngineError, match=r"positions \(3,\) are not those of the decoder"):
            decoder.prefill([sequential(rows, "causal")], room=4)
        back = Block(rows, "causal", following(0, 3, mrope=True)[::-1])
        with pytest.raises(EngineError, match="do not follow"):
            decoder.prefill([back], room=4)
        decoder.prefill([sequential(rows, "causal", mrope=True)], room=4)


JSON = """```json
[
\t{"bbox_2d": [10, 20, 30, 40], "label": "a cat"},
\t{"bbox_2d": [-3, 20, 250, 40.5], "label": "a dog", "sub_label": "x"},
\t{"bbox_2d": [30, 20, 10, 40], "label": "turned"},
\t{"bbox_2d": [1, 2, 3], "label": "short"},
\t{"point_2d": [1, 2], "label": "a point"},
\t{"bbox_2d": [1, 2, "3", 4], "label": "text"},
\t{"bbox_2d": [5, 6, 7, 8], "label": "cut o"""


def test_boxes_are_read_out_of_json() -> None:
    found = [(b.label, b.x0, b.y0, b.x1, b.y1) for b in parse_qwen(JSON, 200, 100)]
    assert found == [("a cat", 10, 20, 30, 40), ("a dog", 0, 20, 200, 40.5)]


def test_boxes_are_read_out_of_thousandths() -> None:
    text = "the eyes(176,106),(232,160) and a nose (500, 500), (1000,1000) (900,1),(3,4) f(x)"
    found = [(b.label, b.x0, b.y0, b.x1, b.y1) for b in parse_qwen(text, 1000, 100)]
    assert found == [
        ("the eyes", 176, 10.6, 232, 16),
        ("and a nose", 500, 50, 1000, 100),
    ]
    assert parse_qwen("no box (1, 2)", 10, 10) == []


def test_boxes_are_in_pixels_of_the_picture(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say those of the picture that they saw, which was resized."""
    from edgevlm.runtimes.text import TextStream

    picture = np.zeros((300, 400, 3), np.uint8)
    with edgevlm.load(bundle) as vlm:
        width, height = plan(400, 300, vlm.manifest.image).canvas
        said = f'{{"bbox_2d": [0, {height // 2}, {width}, {height}], "label": "a"}}'
        always = property(lambda _: said, lambda *_: None)
        monkeypatch.setattr(TextStream, "text", always, raising=False)
        (box,) = vlm.detect("a", picture, max_tokens=1)
    assert (box.x0, box.x1, box.y1) == (0, 400, 300)
    assert box.y0 == pytest.approx(150, abs=3)
