"""Pictures on pinpoints: plans, pixels and joined embeddings, against transformers and LLaVA."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image import cut, read_picture
from edgevlm.image.plan import among, limited, plan
from edgevlm.runtimes.joining import join
from edgevlm.specs import ImageSpec, MapSpec, TileSpec
from tests.test_tiles import pictures, sizes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# As the published files have them: heights and widths, numbers of tiles.
NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION = [(a, b) for a in range(1, 7) for b in range(1, 7)]


def next_spec(size: int = 48, grid: int = 4, **tiles: Any) -> ImageSpec:
    canvases = tuple((b * size, a * size) for a, b in NEXT)
    made = TileSpec(
        "pinpoints",
        overview="first",
        overview_of="picture",
        canvases=canvases,
        map=MapSpec(digits=7),
    )
    tiles = {"tiles": replace(made, **tiles)}
    return ImageSpec(size, grid**2, CLIP_MEAN, CLIP_STD, **tiles)


def onevision_spec(size: int = 48, grid: int = 4, **tiles: Any) -> ImageSpec:
    canvases = tuple((b * size, a * size) for a, b in ONEVISION)
    more = {"canvases": canvases, "map": MapSpec(9, digits=7), "alone": True} | tiles
    return replace(next_spec(size, grid, **more), mean=HALF, std=HALF)


def processor(kind: str, size: int, grids: list[tuple[int, int]]) -> Any:
    import transformers

    hf: Any = transformers
    pinpoints = [[a * size, b * size] for a, b in grids]
    if kind == "next":
        return hf.LlavaNextImageProcessor(
            size={"shortest_edge": size}, crop_size=size, image_grid_pinpoints=pinpoints
        )
    return hf.LlavaOnevisionImageProcessor(
        size={"height": size, "width": size},
        image_mean=HALF,
        image_std=HALF,
        image_grid_pinpoints=pinpoints,
    )


@pytest.mark.parametrize(("size", "grid"), [(336, 24), (48, 4)])
def test_plans_of_next_are_transformers(size: int, grid: int) -> None:
    from transformers.models.llava_next import processing_llava_next as module

    untyped: Any = module
    theirs = SimpleNamespace(
        image_processor=processor("next", size, NEXT),
        patch_size=size // grid,
        num_additional_image_tokens=0,
    )
    theirs._get_unpadded_features = lambda *given: (
        untyped.LlavaNextProcessor._get_unpadded_features(theirs, *given)
    )
    for width, height in sizes():
        rows = untyped.LlavaNextProcessor._get_number_of_features(theirs, height, width, size, size)
        found = plan(width, height, next_spec(size, grid))
        assert found.rows == rows, (width, height)


@pytest.mark.parametrize(("size", "grid"), [(384, 27), (48, 4)])
def test_plans_of_onevision_are_transformers(size: int, grid: int) -> None:
    from transformers.models.llava_onevision import processing_llava_onevision as module

    untyped: Any = module.LlavaOnevisionProcessor
    theirs = SimpleNamespace(
        image_processor=processor("onevision", size, ONEVISION),
        num_image_tokens=grid**2,
        vision_aspect_ratio="anyres_max_9",
    )
    theirs._get_unpadded_features = lambda *given: untyped._get_unpadded_features(theirs, *given)
    shrunk = 0
    for width, height in sizes():
        rows = untyped._get_number_of_features(theirs, height, width, size, size)
        found = plan(width, height, onevision_spec(size, grid))
        assert found.rows == rows, (width, height)
        shrunk += found.shrunk is not None
    assert shrunk > 100


def original(width: int, height: int, size: int, grid: int) -> tuple[tuple[int, int], int]:
    """LLaVA's own canvas and number of rows (llava/mm_utils.py, llava_arch.py), whose pinpoints are
    widths and heights and which rounds nothing.
    """
    best, most, least = (0, 0), 0, float("inf")
    for w, h in ((a * size, b * size) for a, b in NEXT):
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if used > most or (used == most and w * h - used < least):
            best, most, least = (w, h), used, w * h - used
    columns, rows = best[0] // size * grid, best[1] // size * grid
    if width / height > columns / rows:
        rows -= (rows - int(height * (columns / width))) // 2 * 2
    else:
        columns -= (columns - int(width * (rows / height))) // 2 * 2
    return best, grid**2 + rows * (columns + 1)


def test_plans_are_the_originals() -> None:
    size, grid = 336, 24
    canvases = tuple((a * size, b * size) for a, b in NEXT)
    spec = next_spec(size, grid, canvases=canvases, map=MapSpec())
    turned = 0
    for width, height in sizes():
        canvas, rows = original(width, height, size, grid)
        found = plan(width, height, spec)
        assert (found.canvas, found.rows) == (canvas, rows), (width, height)
        turned += canvas != plan(width, height, next_spec(size, grid)).canvas
    # Where both ways round are as good, the first in the list is taken: not the same list.
    assert turned


def test_a_small_square_lies_the_way_of_the_list() -> None:
    spec = next_spec(336, 24)
    assert plan(200, 200, spec).grid == (1, 2)
    canvases = tuple((a * 336, b * 336) for a, b in NEXT)
    assert plan(200, 200, next_spec(336, 24, canvases=canvases)).grid == (2, 1)


# Resized to a single row it is taken for a picture of one channel, whatever was told.
MISTAKEN = "1000x1"


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("name", [name for name in pictures() if name != MISTAKEN])
def test_pixels_are_transformers(name: str, kind: str) -> None:
    picture, size = pictures()[name], 48
    grids, spec = {"next": (NEXT, next_spec), "onevision": (ONEVISION, onevision_spec)}[kind]
    made = processor(kind, size, grids)(
        picture, return_tensors="np", input_data_format="channels_last"
    )
    theirs = np.asarray(made["pixel_values"][0], np.float32)
    np.testing.assert_array_equal(cut(read_picture(picture), spec(size)), theirs)


@pytest.mark.parametrize("name", pictures())
def test_pixels_are_the_originals(name: str) -> None:
    """LLaVA's own: Pillow resizes and cuts, CLIP's processor sees each square."""
    import transformers

    hf: Any = transformers
    size, spec = 48, next_spec(canvases=tuple((a * 48, b * 48) for a, b in NEXT))
    picture = pictures()[name].convert("RGB")
    (w, h), _ = original(*picture.size, size, 4)
    across, down = w / picture.width, h / picture.height
    fit = (w, min(math.ceil(picture.height * across), h))
    if across >= down:
        fit = (min(math.ceil(picture.width * down), w), h)
    canvas = Image.new("RGB", (w, h), (0, 0, 0))
    canvas.paste(picture.resize(fit), ((w - fit[0]) // 2, (h - fit[1]) // 2))
    boxes = [(x, y, x + size, y + size) for y in range(0, h, size) for x in range(0, w, size)]
    squares = [picture.resize((size, size)), *map(canvas.crop, boxes)]
    clip = hf.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    theirs = clip(squares, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(cut(read_picture(pictures()[name]), spec), theirs)


@pytest.mark.parametrize("name", ["300x299", "100x50", "50x100", "1x1", "alpha", "palette"])
def test_pixels_of_several_are_onevisions(name: str) -> None:
    picture = pictures()[name]
    made = processor("onevision", 48, ONEVISION)(
        [[picture, picture]], return_tensors="np", input_data_format="channels_last"
    )
    assert made["pixel_values"].shape[:2] == (2, 1)
    spec = among(onevision_spec(), 2)
    np.testing.assert_array_equal(cut(read_picture(picture), spec), made["pixel_values"][0])
    assert plan(300, 299, spec).rows == 17


def test_alone_or_not() -> None:
    assert among(onevision_spec(), 1) == onevision_spec() and among(next_spec(), 2) == next_spec()
    assert among(onevision_spec(384, 27), 2).fit == "pad"
    with pytest.raises(ImageError, match="too long and narrow"):
        plan(1, 3_000_000, among(onevision_spec(384, 27), 2))


@pytest.mark.parametrize("most", range(1, 39))
def test_a_limit_is_kept_and_no_other_canvas_would_be_better(most: int) -> None:
    spec = onevision_spec(48)
    for width, height in [(640, 480), (480, 640), (1000, 90), (90, 1000), (640, 640), (1, 1)]:
        kept = plan(width, height, limited(spec, most))
        assert kept.n_tiles <= most
        assert len(cut(np.zeros((height, width, 3), np.uint8), limited(spec, most))) == kept.n_tiles
        assert spec.tiles
        fewer = tuple(c for c in spec.tiles.canvases if c[0] * c[1] // 48**2 + 1 <= most)
        if fewer:
            assert kept == plan(width, height, onevision_spec(48, canvases=fewer))
        else:
            assert (kept.n_tiles, kept.grid, kept.rows) == (1, (0, 0), 16 + 1)


def embeddings(n: int, tokens: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(n).normal(size=(n, tokens, width)).astype(np.float32)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_joined_embeddings_are_transformers(kind: str) -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    size, grid, width = 48, 6, 5
    grids, spec, model, more = {
        "next": (NEXT, next_spec, LlavaNextModel, {"vision_feature_select_strategy": "default"}),
        "onevision": (ONEVISION, onevision_spec, LlavaOnevisionModel, {}),
    }[kind]
    vision = SimpleNamespace(image_size=size, patch_size=size // grid)
    pinpoints = [[a * size, b * size] for a, b in grids]
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    newline = np.arange(width, dtype=np.float32)
    untyped: Any = model
    for w, h in [*sizes()[:60], (300, 299), (640, 480), (90, 1000), (288, 288)]:
        planned = plan(w, h, spec(size, grid))
        tiles = embeddings(planned.n_tiles, grid**2, width)
        (theirs,), _ = untyped.pack_image_features(
            SimpleNamespace(config=config),
            [torch.from_numpy(tiles)],
            torch.tensor([[h, w]]),
            image_newline=torch.from_numpy(newline),
            **more,
        )
        ours = join(tiles, planned, newline)
        assert ours.dtype == np.float32 and ours.shape == (planned.rows, width)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
        if not planned.shrunk:
            np.testing.assert_array_equal(ours, theirs.numpy())


def test_an_uncut_picture_ends_in_a_newline() -> None:
    newline, tiles = np.ones(5, np.float32), embeddings(1, 16, 5)
    planned = plan(90, 70, limited(next_spec(), 1))
    np.testing.assert_array_equal(join(tiles, planned, newline), [*tiles[0], newline])


def test_without_a_map_tiles_follow_one_another() -> None:
    planned = plan(90, 70, next_spec(map=None))
    tiles = embeddings(planned.n_tiles, 16, 5)
    np.testing.assert_array_equal(join(tiles, planned, None), tiles.reshape(-1, 5))
    assert planned.rows == planned.n_tiles * 16


def test_rows_are_known_for_the_largest_pictures() -> None:
    assert plan(4000, 4000, next_spec(336, 24)).rows == 576 + 48 * 49
    assert math.isclose(plan(4000, 3000, onevision_spec(384, 27)).rows, 7290, rel_tol=0.1)
