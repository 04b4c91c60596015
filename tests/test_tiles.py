"""Pictures in tiles: plans and pixels, against transformers' processors."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import PromptError
from edgevlm.image import cut, read_picture
from edgevlm.image.plan import limited, plan
from edgevlm.processors import CLIP_MEAN, CLIP_STD
from edgevlm.specs import ImageSpec, TileSpec

HALF = (0.5, 0.5, 0.5)


def smolvlm(size: int = 64, edges: int = 4, *, split: bool = True) -> ImageSpec:
    tiles = TileSpec("longest-edge", edges * size, split=split)
    return ImageSpec(size, 4, HALF, HALF, resample="lanczos", tiles=tiles, rgb="last")


def idefics3(size: int, edges: int, *, split: bool = True) -> Any:
    import transformers

    hf: Any = transformers
    return hf.Idefics3ImageProcessor(
        size={"longest_edge": edges * size},
        max_image_size={"longest_edge": size},
        do_image_splitting=split,
    )


def internvl(size: int = 64, least: int = 1, most: int = 12, *, split: bool = True) -> ImageSpec:
    tiles = TileSpec("ratio", split=split, least=least, most=most, overview_of="picture")
    return ImageSpec(size, 4, CLIP_MEAN, CLIP_STD, tiles=tiles)


def got_ocr2(size: int, most: int = 12, *, split: bool = True) -> Any:
    import transformers

    hf: Any = transformers
    side = {"height": size, "width": size}
    return hf.GotOcr2ImageProcessor(size=side, max_patches=most, crop_to_patches=split)


def gemma3(size: int = 64) -> ImageSpec:
    tiles = TileSpec("pan-and-scan", most=4, overview="first", overview_of="picture")
    return ImageSpec(size, 4, HALF, HALF, resample="bilinear", tiles=tiles)


def pan_and_scan(size: int, picture: Any, most: int = 4) -> Any:
    """Pixels of transformers' Gemma3ImageProcessor as Gemma3Processor calls it."""
    import transformers

    hf: Any = transformers
    made = hf.Gemma3ImageProcessor(size={"height": size, "width": size})(
        picture,
        return_tensors="np",
        input_data_format="channels_last",
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=most,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    return np.asarray(made["pixel_values"], np.float32)


def sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(0, np.log(6000), (4000, 2))).astype(int)
    edges = [(1, 1000), (1000, 1), (1, 1), (4000, 3000), (3000, 4000), (64, 64), (65, 64), (512, 1)]
    return [*edges, *((int(w), int(h)) for w, h in drawn)]


@pytest.mark.parametrize(("size", "edges"), [(512, 4), (384, 4), (364, 4), (512, 10)])
def test_longest_edge_plans_are_idefics3s(size: int, edges: int) -> None:
    from transformers.models.idefics3 import image_processing_idefics3 as untyped

    theirs: Any = untyped

    def canvas(width: int, height: int) -> tuple[int, int]:
        """Sizes without pixels: the steps of resize() and resize_for_vision_encoder()."""
        height, width = theirs._resize_output_size_rescale_to_max_len(
            height, width, max_len=edges * size
        )
        height, width = theirs._resize_output_size_scale_below_upper_bound(
            height, width, max_len=theirs.MAX_IMAGE_SIZE
        )
        seen: list[tuple[int, int]] = []
        kind: Any = theirs.Idefics3ImageProcessor
        noted = SimpleNamespace(
            resize=lambda _, size, **__: seen.append((size["width"], size["height"]))
        )
        blank = np.broadcast_to(np.uint8(0), (height, width, 3))
        kind.resize_for_vision_encoder(noted, blank, size, input_data_format="channels_last")
        return seen[0]

    for width, height in sizes():
        found = plan(width, height, smolvlm(size, edges))
        assert found.canvas == (expected := canvas(width, height)), (width, height)
        n = expected[0] * expected[1] // size**2
        assert found.n_tiles == (n + 1 if n > 1 else 1) and found.rows == 4 * found.n_tiles


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 9), (1, 1), (3, 2), (1, 40)])
def test_ratio_plans_are_got_ocr2s(least: int, most: int) -> None:
    from transformers.models.got_ocr2 import image_processing_got_ocr2 as theirs

    spec = internvl(448, least, most)
    for width, height in [
        *sizes(),
        *((448 * a, 448 * b) for a in range(1, 8) for b in range(1, 8)),
    ]:
        found = plan(width, height, spec)
        columns, rows = theirs.get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        n = columns * rows
        assert found.grid == ((rows, columns) if n > 1 else (0, 0)), (width, height)
        assert found.canvas == (448 * columns, 448 * rows)
        assert found.n_tiles == (n + 1 if n > 1 else 1) and found.rows == 4 * found.n_tiles


def test_a_limit_of_tiles_counts_the_thumbnail() -> None:
    for most in range(1, 15):
        spec = limited(internvl(448), most)
        for width, height in sizes()[:1000]:
            found = plan(width, height, spec)
            whole = plan(width, height, internvl(448, most=min(max(most - 1, 1), 12)))
            assert found.n_tiles <= most and found == whole
    bare = replace(internvl(448), tiles=TileSpec("ratio", most=12, overview="none"))
    assert plan(1000, 500, limited(bare, 2)).n_tiles == 2


@pytest.mark.parametrize("most", [2, 3, 4])
def test_pan_and_scan_plans_are_gemma3s(most: int) -> None:
    import transformers

    hf: Any = transformers
    theirs = hf.Gemma3ImageProcessor()
    for width, height in [*sizes(), (256, 213), (512, 256), (511, 256), (640, 256), (256, 4000)]:
        # Where everything is in a picture of one byte a pixel.
        places = np.lib.stride_tricks.as_strided(
            np.zeros(1, np.uint8), (height, width, 3), (0,) * 3
        )
        parts = theirs.pan_and_scan(places, 256, most, 1.2, input_data_format="channels_last")
        found = plan(width, height, limited(gemma3(), most + 1))
        shapes = [(b - t, r - x) for x, t, r, b in found.tiles] if parts else []
        assert shapes == [part.shape[:2] for part in parts], (width, height)
        assert found.n_tiles == len(parts) + 1 and found.rows == 4 * found.n_tiles
        assert found.grid == (
            (0, 0) if not parts else (1, len(parts)) if width >= height else (len(parts), 1)
        )


@functools.cache
def pictures() -> dict[str, Image.Image]:
    """A picture of every kind and shape that a processor treats by itself."""
    rng = np.random.default_rng(1)

    def noise(width: int, height: int, bands: int = 3) -> NDArray[np.uint8]:
        small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, bands), np.uint8)
        grown = np.repeat(np.repeat(small, 8, 0), 8, 1)[:height, :width]
        return np.ascontiguousarray(grown)

    made = {
        f"{w}x{h}": Image.fromarray(noise(w, h))
        for w, h in (
            (1, 1000), (1000, 1), (1, 1), (2, 3), (64, 64), (65, 64), (63, 200), (100, 50),
            (50, 100), (128, 128), (255, 257), (300, 299), (640, 480), (480, 640), (1000, 90),
            (90, 1000), (2400, 1800),
        )
    }  # fmt: skip
    made["alpha"] = Image.fromarray(noise(150, 90, 4), "RGBA")
    made["alpha, tall"] = Image.fromarray(noise(61, 140, 4), "RGBA")
    made["palette"] = Image.fromarray(noise(140, 80)).quantize(32)
    made["grey"] = Image.fromarray(noise(90, 130)).convert("L")
    return made


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", pictures())
def test_pixels_are_idefics3s(name: str, split: bool) -> None:
    picture = pictures()[name]
    # Told, because it takes one of 1 or 3 rows for one of that many channels.
    made = idefics3(64, 4, split=split)(
        picture, return_tensors="np", input_data_format="channels_last"
    )
    theirs = np.asarray(made["pixel_values"][0], np.float32)
    np.testing.assert_array_equal(cut(read_picture(picture), smolvlm(64, 4, split=split)), theirs)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", pictures())
def test_pixels_are_got_ocr2s(name: str, split: bool) -> None:
    picture = pictures()[name]
    made = got_ocr2(64, split=split)(
        picture, return_tensors="np", input_data_format="channels_last"
    )
    ours = cut(read_picture(picture), internvl(64, split=split))
    np.testing.assert_array_equal(ours, np.asarray(made["pixel_values"], np.float32))


@pytest.mark.parametrize("name", [*pictures(), "1024x300", "257x1100"])
def test_pixels_are_gemma3s(name: str) -> None:
    if name not in pictures():
        width, height = map(int, name.split("x"))
        pictures()[name] = pictures()["2400x1800"].crop((0, 0, width, height))
    picture = pictures()[name].convert("RGB")
    ours = cut(read_picture(picture), gemma3())
    np.testing.assert_array_equal(ours, pan_and_scan(64, picture))
    assert len(ours) == {"1024x300": 4, "257x1100": 5, "2400x1800": 3}.get(name, len(ours))


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 13, 17, 100])
def test_a_limit_is_kept_and_no_finer_grid_would_do(most: int) -> None:
    spec = smolvlm(64, 4)
    for width, height in [(640, 480), (480, 640), (1000, 90), (90, 1000), (640, 640), (1, 1)]:
        free, kept = plan(width, height, spec), plan(width, height, limited(spec, most))
        assert kept.n_tiles <= max(most, 1)
        assert (kept == free) == (free.n_tiles <= most)
        coarser = [plan(width, height, smolvlm(64, n)).n_tiles for n in range(1, 5)]
        assert kept.n_tiles == max([n for n in coarser if n <= most])
        assert len(cut(np.zeros((height, width, 3), np.uint8), limited(spec, most))) == kept.n_tiles


def test_a_limit_leaves_whole_pictures_alone() -> None:
    spec = replace(smolvlm(), tiles=None)
    assert limited(spec, 1) is spec and limited(smolvlm(), None) == smolvlm()


def test_a_limit_of_none_is_refused(tmp_path: Path) -> None:
    import edgevlm

    with pytest.raises(PromptError, match="max_tiles must be at least 1"):
        edgevlm.load(max_tiles=0)
