"""Description of a model family: one object, data and small functions, no engine.

A family is one file in edgevlm/families/ that ends in `FAMILY = Family(...)`; it is found by its
file name. The exporter asks it what a checkpoint's config means and which tensor is which; the
runtime asks it how to read boxes out of an answer.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from edgevlm import schema
from edgevlm.errors import SourceError, UnknownFamily
from edgevlm.parts import Connector, Decoder, VisionTower
from edgevlm.parts.regions import Regions
from edgevlm.specs import (
    AnswerSpec,
    Attention,
    DecoderSpec,
    Fit,
    ImageSpec,
    PromptSpec,
    RegionSpec,
)
from edgevlm.types import Box

T = TypeVar("T")
Config = Mapping[str, Any]
BoxReader = Callable[[str, int, int], list[Box]]

# What Family.locate says of a tensor that checkpoints carry and the model never reads.
IGNORED = ""
# What stands before the names of files and tensors of a vision tower from a folder of its own.
TOWER = "tower/"


class FileError(ValueError):
    """A setting that a family cannot follow, in another file than config.json.

    file: its key in Source.files.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(reason)
        self.file = file


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for a text as a whole.

    `rstrip` says that it swallows the space behind it, `special` that the tokenizer's config gives
    it a role or lists it as special. `odd` names what else it asks of the text around it.
    """

    id: int
    rstrip: bool = False
    special: bool = False
    odd: str = ""


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer as far as prompts depend on it.

    `bytes` is true of a byte-level one, which puts no space before a text, `slow` where there is a
    SentencePiece file for transformers' slow classes; `add_bos` says whether it puts the begin
    token before a text. `added` are the tokens that its side files name, by text. `prepends` says
    where the fast one puts a space: before "every" text between two tokens or the "first", None
    where there is no tokenizer.json to say it. `normalize` is the form of Unicode that it brings
    texts to, "" where it takes them as they are; the exporter hands it to the prompt's spec.
    """

    bytes: bool = False
    slow: bool = True
    add_bos: bool = True
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    prepends: Literal["every", "first"] | None = None
    normalize: Literal["", "NFC"] = ""


@dataclass(frozen=True)
class WeightFile:
    """A published weight file that a model takes beside its main checkpoint.

    name: as users type it; the names of its tensors stand behind it and a slash.
    published: the published file's name, for messages.
    holds: a tensor that tells it from the other files, whatever it is called, and `lacks`
        one that it never has.
    strict: whether a tensor that the family does not know stops the export, or is left over.
    """

    name: str
    published: str
    holds: str
    lacks: str = ""
    strict: bool = False


@dataclass(frozen=True)
class Source:
    """A checkpoint as families see it: its JSON files by name, the shapes of its tensors.

    A vision tower that is a checkpoint of its own has all its names behind TOWER, a weight file
    behind its name and a slash; what it says beside its tensors is its `config.json`, and `origins`
    are the published files' names by weight file. JSON files of the folders beside a main
    checkpoint stand behind "FOLDER/". `template`, `fit` and `settings` are what the user chose or
    knows better than the checkpoint, None for no choice.
    """

    files: Mapping[str, Config]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    template: str | None = None
    fit: Fit | None = None
    tokenizer: Tokenizer = Tokenizer()
    settings: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A checkpoint's config in edgevlm's words.

    `vision`, `projector` and `text` are its parts, `region_model` is another in models that find
    objects by one, with its spec in `regions`. `markers` are tokens, by id, that user text can
    never become; `whole_tokens` are texts that are always one token. `prefix` is what the
    tokenizer puts before every text, " " for LLaMA's; the template holds it. With `prefix_once` it
    does so only before a whole prompt that has none of its own.
    `original` is the prompt as the original's code writes it: one text, `<image>` and `{prompt}` in
    it.
    `stop_pieces` are texts that end an answer, `penalized_pieces` such that count as part of it for
    the repetition penalty, where the vocabulary has them as one token. With `own_tokenizer` the
    bundle has the checkpoint's tokenizer.json, which cuts texts as llama.cpp may not. `notes` say,
    a line each, what the checkpoint left open and how it was settled.
    """

    image: ImageSpec
    prompt: PromptSpec
    decoder: DecoderSpec
    answer: AnswerSpec
    vision: VisionTower
    projector: Connector
    text: Decoder
    markers: Mapping[int, str] = field(default_factory=dict)
    whole_tokens: tuple[str, ...] = ()
    prefix: str = ""
    prefix_once: bool = False
    original: str = ""
    stop_pieces: tuple[str, ...] = ()
    penalized_pieces: tuple[str, ...] = ()
    own_tokenizer: bool = False
    region_model: Regions | None = None
    regions: RegionSpec | None = None
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[str, ...]:
        """Beginnings of canonical names of tensors that the model carries and never reads."""
        return tuple(f"vision.{start}" for start in self.vision.unread)

    def prefixed(self, text: str) -> str:
        """A text with the prefix that the tokenizer puts before it when it is given alone."""
        # SentencePiece's sign is a space to it.
        own = self.prefix_once and text.startswith((self.prefix, "\u2581"))
        return text if own or not text else self.prefix + text


@dataclass(frozen=True)
class Family:
    """A family of models.

    name: as in manifests and file names.
    license: licence of the published weights, where the checkpoint does not state one.
    model_types: values of `model_type` in config.json that belong to it.
    claims: config.json -> whether it is this family's although its `model_type` is another's, too;
        None if its model types say enough.
    describe: Source -> Model. Raises ValueError with one line that names the key if the config is
        not one of this family, or the choice if the user's is not; FileError for another file.
    locate: name of a source tensor -> "vision.…", "projector.…", "decoder.…" or, of a region model,
        "regions.…" in the canonical
        names of the builders, IGNORED if the model never uses it, None if it is not known.
    boxes: answer text, width and height in pixels of the picture, or of what the encoder saw of
        one that keeps its shape -> boxes in such pixels; None if the family has none.
    tower: Source -> folder or hub name of the vision tower that the checkpoint leaves out, None
        where it is whole; None if no checkpoint of the family leaves it out.
    processor: Source -> folder that the original reads the picture processor from, where that is
        another one and the tower is inside; None if there is none.
    tokenizer: Source -> folder or hub name of the tokenizer that the original reads, where that is
        another repository's, None where it is the checkpoint's; None if it always is.
    weight_files: the files beside the checkpoint that `model_types` name, in the
        order in which the original project loads them: of two tensors with one canonical name the
        later wins. Empty where a checkpoint is whole.
    settings: what users may state that checkpoints leave open, by name, with a line of explanation.
    needs: roles of the components that a bundle of the family must have.
    refused: values of `model_type` of its kin that it does not read -> the reason, in one line.
    """

    name: str
    license: str
    model_types: tuple[str, ...]
    describe: Callable[[Source], Model]
    locate: Callable[[str], str | None]
    boxes: BoxReader | None = None
    tower: Callable[[Source], str | None] | None = None
    processor: Callable[[Source], str | None] | None = None
    tokenizer: Callable[[Source], str | None] | None = None
    weight_files: tuple[WeightFile, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ("vision", "projector", "decoder")
    claims: Callable[[Config], bool] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def locating(
    parts: Sequence[tuple[re.Pattern[str], str]], unused: re.Pattern[str]
) -> Callable[[str], str | None]:
    """A `Family.locate` by patterns: what follows a pattern's prefix stands behind its part's."""

    def locate(name: str) -> str | None:
        if unused.fullmatch(name):
            return IGNORED
        for pattern, part in parts:
            if match := pattern.fullmatch(name):
                return part + match[1]
        return None

    return locate


# More layers than any model has, and the largest size that engines hold.
_MOST_LAYERS, _LARGEST = 1000, 2**31 - 1


def read_config(defaults: T, config: Config, where: str = "") -> T:
    """`defaults` with what a config states for any of its fields.

    Raises ValueError for a value of another type, or below 1 where the field is a plain int;
    `where` stands before the key in the message.
    """
    hints = schema.hints(type(defaults))
    found = {}
    for key in (f.name for f in fields(defaults) if f.name in config):  # type: ignore[arg-type]
        found[key] = schema.typed(hints[key], config[key], where + key)
        if hints[key] is int and found[key] < 1:
            raise ValueError(f"{where}{key} is {found[key]}; it must be at least 1")
        most = _MOST_LAYERS if key.endswith("layers") else _LARGEST
        if isinstance(found[key], int) and found[key] > most:
            raise ValueError(
                f"{where}{key} is {str(found[key])[:20]}; no model has more than {most}"
            )
    return replace(defaults, **found)  # type: ignore[type-var]


def setting(config: Config, key: str, default: T) -> T:
    """The value of a config's key, of the default's type; raises ValueError for another."""
    value: T = schema.typed(type(default), config[key], key) if key in config else default
    return value


def section(config: Config, key: str) -> Config:
    """The object inside a config, empty for null and none; raises ValueError for another type."""
    found: Config | None = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{key} is {found!r}, not an object")
    return found or {}


def decoder_spec(text: Decoder, attention: Attention, *, extra_norms: bool = False) -> DecoderSpec:
    """The runtime's view of a decoder."""
    return DecoderSpec(
        architecture=text.architecture,
        attention=attention,
        n_embd=text.hidden_size,
        n_layer=text.num_hidden_layers,
        n_vocab=text.vocab_size,
        context_length=text.max_position_embeddings,
        extra_norms=extra_norms,
        positions=text.positions,
        short_context=text.short_context,
    )


def stop_tokens(files: Mapping[str, Config], decoder: Config, default: int) -> tuple[int, ...]:
    """The end tokens; generation_config.json wins over config.json, that over the decoder's own
    config and that class's default. Raises ValueError for what is not an id.
    """
    found = [c.get("eos_token_id") for c in (decoder, *map(files.get, _ENDS)) if c]
    eos = next((e for e in reversed(found) if e is not None), default)
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id is {eos!r}, neither an id nor a list of them")
    return ids


_ENDS = ("config.json", "generation_config.json")


def rope_parameters(config: Config) -> dict[str, Any]:
    """The rotary positions of a decoder's config, where transformers 4 or 5 writes it.

    Transformers 5 may say it for every kind of layer; raises ValueError where they differ.
    """
    found = section(config, "rope_parameters") or section(config, "rope_scaling")
    kinds = list(found.values())
    if kinds and all(isinstance(kind, Mapping) for kind in kinds):
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(
                f"rope_parameters differ by layer ({', '.join(found)}); only the same are known"
            )
        found = kinds[0]
    rope: dict[str, Any] = {"rope_type": found.get("type", "default")} | dict(found)
    for key in ("rope_theta", "partial_rotary_factor"):
        above = config.get(key)
        if above is not None and rope.setdefault(key, above) != above:
            raise ValueError(
                f"{key} is {above!r}, but {rope[key]!r} in rope_parameters; remove the one that is "
                "not the model's"
            )
    return rope


@functools.cache
def known() -> tuple[str, ...]:
    """Names of all families, sorted."""
    package = importlib.import_module("edgevlm.families")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def by_name(name: str, where: str) -> Family:
    """The family of that name; `where` names the file that asked, for UnknownFamily."""
    if name not in known():
        raise UnknownFamily(name, [*known()], where)
    family = importlib.import_module(f"edgevlm.families.{name}").FAMILY
    assert isinstance(family, Family)
    return family


def by_config(config: Config, where: str) -> Family:
    """The family that reads a config.json, by its `model_type`; raises UnknownFamily, and
    SourceError for one that a family refuses.
    """
    families, model_type = every(), config["model_type"]
    claiming = [family for family in families if family.claims and family.claims(config)]
    for family in (*claiming, *families):
        if model_type in family.model_types:
            return family
    for family in families:
        if reason := family.refused.get(model_type):
            raise SourceError(f"{where}: model_type {model_type!r} is {reason}")
    raise UnknownFamily(model_type, [t for f in families for t in f.model_types], where)


def every() -> list[Family]:
    """All families, by name."""
    return [by_name(name, "") for name in known()]
