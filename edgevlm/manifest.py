"""The manifest of a bundle, edgevlm.json: everything that a runtime needs to know of a model.

It is read and checked here, and written in the oldest format that says all of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm import schema
from edgevlm.errors import BundleCorrupt, BundleNotFound, BundleTooNew
from edgevlm.spec_bounds import out_of_bounds
from edgevlm.specs import (
    AnswerSpec,
    DecoderSpec,
    ImageSpec,
    PromptSpec,
    RegionSpec,
    SelfCheck,
    TensorLocation,
    TextSpec,
)

FORMAT = 4
MANIFEST = "edgevlm.json"
ROLES = ("vision", "projector", "decoder", "text", "masks", "regions")
# The first format in which a component could have that role; others are as old as format 2.
_SINCE = {"masks": 3, "text": 4, "regions": 4}
_SINCE_KEYS = {"self_check": 4, "text": 4, "regions": 4}
# What a manifest states beside a decoder.
_DECODING = ("prompt", "decoder", "answer", "token_embedding")


@dataclass(frozen=True)
class FileRecord:
    """A file, its size in bytes and its SHA-256 (hex); `sample` is the hash of the cheap check."""

    file: str
    bytes: int
    sha256: str
    sample: str = ""


@dataclass(frozen=True)
class Component:
    """One part of the model: its precision ("int8", "q4_k_m") and its files, the main one first."""

    precision: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class StageParity:
    """One stage's distance from the source: `worst` by `metric`, allowed up to `tolerance`."""

    stage: str
    metric: str
    worst: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if the stage is within its tolerance."""
        return self.worst <= self.tolerance


@dataclass(frozen=True)
class WeightFileRecord:
    """The record of one weight file of a model that was assembled from several.

    `used` are the tensors that are in the bundle, `replaced` those of which a later file had its
    own, `unused` those that the model never reads. Layers are counted, not listed:
    "layers.*.mlp.fc1.bias x32".
    """

    name: str = field(metadata={"key": "piece"})
    file: str
    used: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know about a bundle; stored as edgevlm.json.

    `components` go by their role. `alternatives` are further vision encoders by precision; the main
    one is in `components`. Without a decoder `prompt`, `decoder`, `answer` and `token_embedding`
    are empty; `text` is a dual encoder's, None of other models, `regions` the region model's.
    `weight_files` say what came from where in a model of several weight files, `notes` what
    those left open and how it was settled. `origin` is the source's repository and commit on the
    hub, `org/name@COMMIT`, empty for a source of another kind. `self_check` is what machines
    compare their features with; bundles of older formats have none.
    """

    format: int
    family: str
    name: str
    license: str
    components: Mapping[str, Component]
    image: ImageSpec
    prompt: PromptSpec = PromptSpec(())
    decoder: DecoderSpec = DecoderSpec("", "causal", 0, 0, 0, 0)
    answer: AnswerSpec = AnswerSpec(())
    token_embedding: TensorLocation = TensorLocation(0, "", 0, 0)
    source: tuple[FileRecord, ...] = ()
    parity: tuple[StageParity, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    alternatives: Mapping[str, Component] = field(default_factory=dict)
    weight_files: tuple[WeightFileRecord, ...] = field(default=(), metadata={"key": "pieces"})
    notes: tuple[str, ...] = ()
    origin: str = ""
    self_check: SelfCheck | None = None
    text: TextSpec | None = None
    regions: RegionSpec | None = None

    def __repr__(self) -> str:
        precisions = ", ".join(f"{role} {c.precision}" for role, c in self.components.items())
        return f"<Manifest of {self.name}, {self.family}: {precisions}>"

    @property
    def all_components(self) -> tuple[Component, ...]:
        """Every component with its files, the alternatives after the main ones."""
        return (*self.components.values(), *self.alternatives.values())


def read_manifest(root: Path) -> Manifest:
    """Reads and checks a bundle's manifest, without a look at its files. Raises BundleError."""
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleNotFound(f"{root}: no such bundle folder; `edgevlm models` lists some")
    if not path.is_file():
        raise BundleNotFound(
            f"{root}: not a bundle, it has no {MANIFEST}; "
            "`edgevlm export` makes one from a checkpoint"
        )
    try:
        data: Any = schema.parsed(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise BundleCorrupt(path, f"cannot be read as JSON ({e})") from None
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BundleTooNew(path, found, FORMAT)
    try:
        manifest = schema.read(Manifest, data)
        if "decoder" in manifest.components and (missing := {*_DECODING} - {*data}):
            raise schema.SchemaError(f"missing key {min(missing)!r}")
        decoder = manifest.decoder if "decoder" in manifest.components else None
        problem = out_of_bounds(manifest.image, decoder, manifest.regions, manifest.prompt.video)
        if problem:
            raise schema.SchemaError(problem)
    except schema.SchemaError as e:
        raise BundleCorrupt(path, str(e)) from None
    if manifest.format < 1:
        raise BundleCorrupt(path, f"format {manifest.format} was never released")
    _check_components(path, manifest)
    # Older formats say nothing that this one does not.
    return dataclasses.replace(manifest, format=FORMAT)


def _check_components(path: Path, manifest: Manifest) -> None:
    roles = {*manifest.components}
    known = {*ROLES[:3]} == roles if manifest.format == 1 else roles and roles <= {*ROLES}
    dual = {"vision", "text"} == roles
    apart = ("vision" in roles) != ("projector" in roles) and not dual
    if ("text" in roles) != (manifest.text is not None) or ("text" in roles and not dual):
        raise BundleCorrupt(
            path, "'text' must stand beside a component 'text' and a vision encoder"
        )
    if ("regions" in roles) != (manifest.regions is not None):
        raise BundleCorrupt(path, "'regions' must stand beside a component 'regions'")
    if not known or apart or not all(c.files for c in manifest.components.values()):
        raise BundleCorrupt(
            path,
            f"'components' must be of {', '.join(ROLES)}, each with files, and a projector with a "
            "vision encoder",
        )
    main = manifest.components.get("vision")
    for name, component in manifest.alternatives.items():
        taken = not main or name == main.precision
        if name != component.precision or taken or not component.files:
            raise BundleCorrupt(
                path, f"'alternatives.{name}' must be another {name} vision encoder with files"
            )
    names = [entry.file for c in manifest.all_components for entry in c.files]
    for name in names:
        if not name or Path(name).name != name:
            raise BundleCorrupt(path, f"{name!r} is not a plain file name")
        if names.count(name) > 1:
            raise BundleCorrupt(path, f"{name!r} is named twice")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes edgevlm.json into a folder that holds the components."""
    # The oldest format that says all of it, for the sake of older readers.
    oldest = max([2, *(_SINCE.get(role, 2) for role in manifest.components)])
    written = schema.plain(dataclasses.replace(manifest, format=oldest))
    for key, since in _SINCE_KEYS.items():
        if getattr(manifest, key) is None:
            del written[key]  # older readers refuse what they do not know
        else:
            written["format"] = max(written["format"], since)
    text = json.dumps(written, indent=1, ensure_ascii=False)
    # A file's name may be no text: a backslash escape is how JSON says that.
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
