"""Pictures resized in their own shape and padded after that, against the processors that do so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import EdgeVLMError
from edgevlm.family import FileError
from edgevlm.image import cut, read_picture
from edgevlm.image.plan import plan
from edgevlm.image_specs import image_spec
from edgevlm.processors import DEEPSEEK_VL, PREPROCESSOR, VLM, find_settings
from edgevlm.specs import ImageSpec
from tests.test_tiles import pictures, sizes

HALF = [0.5, 0.5, 0.5]
OWN: dict[str, Any] = {
    "background_color": [127, 127, 127],
    "do_normalize": True,
    "image_mean": HALF,
    "image_processor_type": "VLMImageProcessor",
    "image_size": 384,
    "image_std": HALF,
    "min_size": 14,
    "processor_class": "VLChatProcessor",
    "rescale_factor": 0.00392156862745098,
}


def spec(stated: dict[str, Any], kind: str, side: int = 384) -> ImageSpec:
    found = find_settings({PREPROCESSOR: stated}, kind, (kind,))
    assert found
    return image_spec(found, side, 576)


def transformers_class(**settings: Any) -> Any:
    import transformers

    hf: Any = transformers
    return hf.DeepseekVLImageProcessor(**{"image_mean": HALF, "image_std": HALF} | settings)


def stated(processor: Any) -> dict[str, Any]:
    """The settings that the class writes into its file."""
    found: dict[str, Any] = json.loads(processor.to_json_string())
    return found


def shapes() -> list[tuple[int, int]]:
    """Sizes of any shape, and those of cameras, whose sides become integers but for rounding."""
    ratios = ((3, 2), (4, 3), (16, 9), (1, 1), (9, 20))
    return [*sizes(), *((n * a, n * b) for a, b in ratios for n in range(1, 400))]


def original(picture: Image.Image, size: int, least: int) -> Any:
    """deepseek_vl/models/image_processing_vlm.py without torch, whose resize of a picture is
    Pillow's.
    """
    width, height = picture.size
    long = max(width, height)
    w, h = (max(int(side / long * size), least) for side in (width, height))
    resized = picture.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (max(w, h),) * 2, (127, 127, 127))
    square.paste(resized, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
    scaled = (np.asarray(square).astype(np.float64) / 255).astype(np.float32)
    return ((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [384, 64])
def test_plans_are_transformers(size: int) -> None:
    from transformers.models.deepseek_vl import image_processing_deepseek_vl as untyped

    theirs: Any = untyped
    kind, noted = theirs.DeepseekVLImageProcessor, list[tuple[int, int]]()
    seen = SimpleNamespace(min_size=14)
    side = {"height": size, "width": size}
    ours, whole = spec(stated(transformers_class(size=side)), DEEPSEEK_VL, size), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "resize", lambda _, size, **__: noted.append((size[1], size[0])))
        for width, height in shapes():
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))
            kind.resize(seen, blank, side, input_data_format="channels_last")
            found = plan(width, height, ours)
            assert found.resized and max(found.resized) == size and found.n_tiles == 1
            if max(noted[-1]) == size:
                assert found.resized == noted[-1], (width, height)
                whole += 1
    # What is left transformers makes a smaller square of, at which its tower stops.
    assert whole > 0.9 * len(noted) > 3000


def test_plans_are_the_originals() -> None:
    ours, own = spec(OWN, VLM), 0
    for width, height in shapes():
        found, long = plan(width, height, ours), max(width, height)
        expected = tuple(max(int(n / long * 384), 14) for n in (width, height))
        assert found.resized == expected and found.rows == 576
        own += found.resized != plan(width, height, spec(OWN | as_theirs(), DEEPSEEK_VL)).resized
    assert own  # The two round some pictures to different sides.


def as_theirs() -> dict[str, Any]:
    return {"image_processor_type": "DeepseekVLImageProcessor", "image_size": None}


@pytest.mark.parametrize("size", [384, 64])
@pytest.mark.parametrize("name", pictures())
def test_pixels_are_transformers(name: str, size: int) -> None:
    picture = pictures()[name].convert("RGB")
    processor = transformers_class(size={"height": size, "width": size}, do_convert_rgb=True)
    made = processor(picture, return_tensors="np", input_data_format="channels_last")
    theirs = np.asarray(made["pixel_values"][0], np.float32)
    ours = cut(read_picture(pictures()[name]), spec(stated(processor), DEEPSEEK_VL, size))
    if theirs.shape == ours[0].shape:
        np.testing.assert_array_equal(ours[0], theirs)
    else:
        assert theirs.shape[1] == size - 1


@pytest.mark.parametrize("name", pictures())
def test_pixels_are_the_originals(name: str) -> None:
    for side in (384, 64):
        ours = cut(read_picture(pictures()[name]), spec(OWN | {"image_size": side}, VLM, side))
        np.testing.assert_array_equal(ours[0], original(pictures()[name], side, 14))


def test_settings_of_transformers_are_followed() -> None:
    picture = pictures()["100x50"]
    for settings in (
        {"resample": 2, "min_size": 40, "image_mean": [0.2, 0.4, 0.6]},
        {"image_mean": None, "image_std": None},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
    ):
        processor = transformers_class(size={"height": 64, "width": 64}, **settings)
        theirs = processor(picture, return_tensors="np")["pixel_values"]
        files = stated(processor) | {k: v for k, v in settings.items() if v is None}
        if "image_mean" in settings and settings["image_mean"] is None:
            # Its file has the class's mean then, of which it would make another colour.
            files.pop("background_color")
        ours = cut(read_picture(picture), spec(files, DEEPSEEK_VL, 64))
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (VLM, {"background_color": [0, 0, 0]}, "background_color is .*make it"),
        (VLM, {"image_size": 448}, "image_size is 448; the vision tower takes 384"),
        (VLM, {"image_size": None}, "image_size is None; only a square"),
        (VLM, {"do_resize": False, "resample": 2}, "resample is 2; a VLMImageProcessor ignores"),
        (VLM, {"min_size": 0}, "min_size is 0"),
        (VLM, {"min_size": 500}, "min_size is 500; the vision tower takes 384"),
        (VLM, {"image_processor_type": "JanusImageProcessor"}, "image_processor_type"),
        (DEEPSEEK_VL, as_theirs() | {"do_pad": False}, "do_pad is False; only true"),
        (DEEPSEEK_VL, as_theirs() | {"do_resize": False}, "do_resize is False"),
        (DEEPSEEK_VL, as_theirs() | {"size": {"shortest_edge": 384}}, "only a square"),
    ],
)
def test_what_cannot_be_followed_is_refused(kind: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FileError, match=says):
        spec(OWN | changes, kind)


def test_a_long_picture_is_no_error(tmp_path: Path) -> None:
    thin = np.zeros((200_000, 1, 3), np.uint8)
    try:
        assert cut(thin, spec(OWN, VLM)).shape == (1, 3, 384, 384)
    except EdgeVLMError:
        pytest.fail("refused")
