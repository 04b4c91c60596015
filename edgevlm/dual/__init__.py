"""Dual encoders: a picture and a text become rows of one space. One file for each layout.

Like a family (edgevlm/family.py), a file ends in `FAMILY = DualFamily(...)`, data and small
functions. There is no decoder, so nothing of prompts and answers is in it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.family import Config, Source
from edgevlm.parts import Part
from edgevlm.parts.picture_encoder import PictureEncoder
from edgevlm.parts.text_tower import TextTower
from edgevlm.specs import ImageSpec, TextSpec

CONFIG, OPEN_CLIP = "config.json", "open_clip_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Configs that are dual encoders' and read by nobody here, with the reason.
_REFUSED = {
    "siglip2": "SigLIP 2 NaFlex takes pictures of any shape as rows of patches, which edgevlm does "
    "not; export a fixed size, such as google/siglip2-base-patch16-224",
    "metaclip_2": "MetaCLIP 2 is not known; export a MetaCLIP, such as facebook/metaclip-b32-400m",
}


@dataclass(frozen=True)
class DualModel:
    """A checkpoint's config in edgevlm's words; `text` lacks what the tokenizer and the tensors
    say. `towers` are its parts, `notes` lines for the manifest.
    """

    image: ImageSpec
    text: TextSpec
    vision: PictureEncoder
    tower: TextTower
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, Part]:
        """Both sides by their role."""
        return {"vision": self.vision, "text": self.tower}


@dataclass(frozen=True)
class DualFamily:
    """A layout of dual encoders.

    name: as in manifests and file names.
    license: licence of the weights, where the checkpoint does not state one.
    model_types: values of `model_type` in config.json; empty for a layout without that file.
    describe: Source -> DualModel; raises ValueError or FileError as Family.describe.
    locate: name of a source tensor -> "vision.…", "text.…" or "score.…", the two numbers of a
        score; IGNORED or None as Family.locate.
    """

    name: str
    license: str
    model_types: tuple[str, ...]
    describe: Callable[[Source], DualModel]
    locate: Callable[[str], str | None]


@functools.cache
def known() -> tuple[str, ...]:
    """Names of all layouts, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def by_name(name: str) -> DualFamily:
    """The layout of a name that is known."""
    family = importlib.import_module(f"edgevlm.dual.{name}").FAMILY
    assert isinstance(family, DualFamily)
    return family


def find(files: Mapping[str, Config]) -> DualFamily | None:
    """The layout of a checkpoint's JSON files, None where they are another model's.

    Raises ValueError for a dual encoder that is known not to be read.
    """
    kind: Any = files.get(CONFIG, {}).get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"model_type is {kind!r}, not a name")
    if kind in _REFUSED:
        raise ValueError(_REFUSED[kind])
    if kind is None:
        return by_name("open_clip") if OPEN_CLIP in files else None
    return next((f for f in map(by_name, known()) if kind in f.model_types), None)


def most_tokens(files: Mapping[str, Config], positions: int, default: int | None = None) -> int:
    """The length of a text: the tower's positions, or fewer where the tokenizer's config says so;
    `default` is that of a tokenizer which does not say.
    """
    said = files.get(TOKENIZER_CONFIG, {}).get("model_max_length", default)
    return min(positions, said) if isinstance(said, int) and said > 0 else positions
