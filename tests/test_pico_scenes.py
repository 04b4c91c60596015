"""Scenes that a model is measured with are drawn with files of the package alone."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgevlm.benchmarks.scenes.assets import (
    ASSETS,
    FACE_NAMES,
    WORD_FACES,
    Face,
    font,
    object_bitmaps,
)
from edgevlm.benchmarks.scenes.evaluate import GENERATORS, held_out
from edgevlm.benchmarks.scenes.kinds import OBJECTS


def drawn(letters: ImageFont.FreeTypeFont, text: str) -> NDArray[np.uint8]:
    canvas = Image.new("L", (400, 80))
    ImageDraw.Draw(canvas).text((10, 10), text, font=letters, fill=255)
    return np.asarray(canvas)


@pytest.mark.parametrize("generator", GENERATORS)
def test_held_out_scenes_need_no_font_of_the_machine(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    truetype = ImageFont.truetype

    def watched(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, str):  # else Pillow's own
            opened.append(file)
        return truetype(file, *args, **options)

    monkeypatch.setattr(ImageFont, "truetype", watched)
    font.cache_clear()
    object_bitmaps.cache_clear()
    words = [scene.word for scene, _ in held_out(generator, 60)]
    assert sum(word is not None for word in words) > 3
    assert opened and {Path(file).parent for file in opened} == {ASSETS}
    # Raqm is there or not, by the machine.
    assert {font(face, 20).layout_engine for face in (None, *WORD_FACES)} == {
        ImageFont.Layout.BASIC
    }


def test_the_sheet_holds_every_drawing_of_every_object() -> None:
    bitmaps = object_bitmaps()
    assert {kind: len(found) for kind, found in bitmaps.items()} == {
        kind: len(symbols) for kind, symbols in OBJECTS.items()
    }
    every = [bitmap for found in bitmaps.values() for bitmap in found]
    assert all(max(bitmap.size) > 100 and bitmap.mode == "RGBA" for bitmap in every)
    assert all(bitmap.getchannel("A").getbbox() == (0, 0, *bitmap.size) for bitmap in every)
    assert len({bitmap.tobytes() for bitmap in every}) == len(every)
    # Facts that anyone can see of Noto's drawings: an order that slipped would not keep them.
    means = {kind: np.asarray(found[0])[np.asarray(found[0])[..., 3] > 250][:, :3].mean(0)
             for kind, found in bitmaps.items()}  # fmt: skip
    red, green, blue = range(3)
    assert means["apple"].argmax() == means["strawberry"].argmax() == red
    assert means["frog"].argmax() == means["tree"].argmax() == green
    assert means["fish"].argmax() == means["bird"].argmax() == blue


@pytest.mark.parametrize("face", WORD_FACES)
def test_a_face_has_every_letter(face: Face) -> None:
    family, style = font(face, 20).getname()
    name = FACE_NAMES[face.number]
    assert family and (family.replace(" ", ""), style) == (
        name.removesuffix("-Bold"),
        "Bold" if name.endswith("-Bold") else "Book",
    )
    missing = drawn(font(face, 40), "\u00e9")
    seen = [drawn(font(face, 40), letter) for letter in string.ascii_letters]
    assert not any(np.array_equal(missing, letter) for letter in seen)
    assert all(letter.any() for letter in seen)


def test_the_faces_are_told_apart() -> None:
    every = {drawn(font(face, 30), "Rag").tobytes() for face in (None, *WORD_FACES)}
    assert len(every) == len(FACE_NAMES) + 1
