"""What a family of models must state: one object, data and small functions, no engine.

A family is one file in edgevlm/families/ that ends in `FAMILY = Family(...)`; it is found by its
file name. The exporter asks it what a checkpoint's config means and which tensor is which; the
runtime asks it how to read boxes out of an answer.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgevlm.errors import UnknownFamily
from edgevlm.specs import AnswerSpec, DecoderSpec, ImageSpec, PromptSpec
from edgevlm.types import Box

Config = Mapping[str, Any]

# What Family.locate says of a tensor that checkpoints carry and the model never reads.
IGNORED = ""


@dataclass(frozen=True)
class Model:
    """A checkpoint's config in edgevlm's words.

    `vision`, `projector` and `text` are the sub-configs that the exporter's builders take; they
    name the kind of each part (`vision["kind"] == "siglip"`). `markers` are tokens, by id, that
    user text can never become; `whole_tokens` are pieces of text that are always one token.
    """

    image: ImageSpec
    prompt: PromptSpec
    decoder: DecoderSpec
    answer: AnswerSpec
    vision: Config
    projector: Config
    text: Config
    markers: Mapping[int, str] = field(default_factory=dict)
    whole_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of models.

    name: as in manifests and file names.
    license: licence of the published weights, where the checkpoint does not state one.
    model_types: values of `model_type` in config.json that belong to it.
    describe: the checkpoint's JSON files by name -> Model. Raises ValueError with one line that
        names the key if the config is not one of this family.
    locate: name of a source tensor -> "vision.…", "projector.…" or "decoder.…" in the canonical
        names of the builders, IGNORED if the model never uses it, None if it is not known.
    boxes: answer text, picture width and height in pixels -> boxes; None if the family has none.
    """

    name: str
    license: str
    model_types: tuple[str, ...]
    describe: Callable[[Mapping[str, Config]], Model]
    locate: Callable[[str], str | None]
    boxes: Callable[[str, int, int], list[Box]] | None = None


def known() -> list[str]:
    """Names of all families, sorted."""
    package = importlib.import_module("edgevlm.families")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def by_name(name: str, where: str) -> Family:
    """The family of that name; `where` names the file that asked, for UnknownFamily."""
    if name not in known():
        raise UnknownFamily(name, known(), where)
    family = importlib.import_module(f"edgevlm.families.{name}").FAMILY
    assert isinstance(family, Family)
    return family


def by_model_type(model_type: str, where: str) -> Family:
    """The family that reads config.json's `model_type`; raises UnknownFamily."""
    families = [by_name(name, where) for name in known()]
    for family in families:
        if model_type in family.model_types:
            return family
    raise UnknownFamily(model_type, [t for f in families for t in f.model_types], where)
