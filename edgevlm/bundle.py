"""The bundle: one folder that holds a converted model and says everything about it.

    edgevlm.json     the manifest (class Manifest)
    vision.onnx      pixels float32 [n, 3, size, size] -> features float32 [n, patches, width]
    projector.onnx   features -> embeddings float32 [n, tokens, n_embd]
    decoder.gguf     the language decoder with its tokenizer
    decoder.tokenizer.json  its tokenizer, where llama.cpp does not cut texts as it does
    decoder.input.gguf      the tokenizer and token embeddings of all tokens, where the decoder was
                     trimmed to those of some languages
    projector.newline.npy   float32 [n_embd], a row that ends lines, where tiles are joined to a map
    regions.onnx     rows of the decoder's last layer float32 [n, n_embd] -> bins [n, bins], and
    regions.rows.onnx       places and sizes [n, 3] -> rows [n, 2, n_embd] that it reads
    text.onnx        a dual encoder's, ids int64 [n, tokens] -> unit rows float32 [n, width]
    text.tokenizer.json or text.spiece.model        its tokenizer

Each component has a role; which of them there are is the family's to say, and a bundle without a
decoder can only embed pictures. A dual encoder's has "vision", whose output is one unit row for a
picture, float32 [n, width], and "text". Format 1 had all three of the above, and says the same of
them. A bundle may hold the vision encoder at further precisions, as vision.PRECISION.onnx. Large
ONNX weights lie beside the graph in files named in the manifest. This module knows files, hashes
and the manifest; it does not know what an engine makes of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgevlm import cleanup, schema
from edgevlm.errors import BundleCorrupt, BundleError, BundleNotFound, BundleTooNew
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
from edgevlm.types import Progress

FORMAT = 4
MANIFEST = "edgevlm.json"
NEWLINE = "projector.newline.npy"
INPUT = "decoder.input.gguf"
DECODER_TOKENIZER = "decoder.tokenizer.json"
REGIONS, REGION_ROWS = "regions.onnx", "regions.rows.onnx"
# The tokenizer of a dual encoder: one for the package tokenizers, or SentencePiece's.
TOKENIZER, SPIECE = "text.tokenizer.json", "text.spiece.model"
ROLES = ("vision", "projector", "decoder", "text", "masks", "regions")
# The first format in which a component could have that role; others are as old as format 2.
_SINCE = {"masks": 3, "text": 4, "regions": 4}
_SINCE_KEYS = {"self_check": 4, "text": 4, "regions": 4}
# What a manifest states beside a decoder.
_DECODING = ("prompt", "decoder", "answer", "token_embedding")

# Files up to this size are hashed whole on every load; of larger ones the cheap check reads
# SAMPLES blocks, evenly spread, so that a bundle of gigabytes opens in milliseconds.
WHOLE_BYTES = 64 << 20
SAMPLES = 64
BLOCK_BYTES = 64 << 10

Check = Literal["quick", "full"]


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"<Bundle {self.manifest.name} in {self.folder}>"

    def path(self, component: str) -> Path:
        """The main file of a component, by its role."""
        return self.folder / self.manifest.components[component].files[0].file

    @property
    def newline(self) -> Path | None:
        """The projector's file with a row that ends lines; None where there is none."""
        names = [record.file for record in self.manifest.components["projector"].files]
        return self.folder / NEWLINE if NEWLINE in names else None

    @property
    def input(self) -> Path:
        """The file with the tokenizer and all token embeddings: the decoder's own, or the one that
        lies beside a trimmed decoder.
        """
        names = [record.file for record in self.manifest.components["decoder"].files]
        return self.folder / INPUT if INPUT in names else self.path("decoder")

    @property
    def tokenizer(self) -> Path | None:
        """The file that makes ids of texts beside the decoder; None where llama.cpp does."""
        names = [record.file for record in self.manifest.components["decoder"].files]
        return self.folder / DECODER_TOKENIZER if DECODER_TOKENIZER in names else None

    @property
    def names(self) -> frozenset[str]:
        """The names of all files of the components."""
        return frozenset(r.file for c in self.manifest.all_components for r in c.files)

    @property
    def vision_precisions(self) -> tuple[str, ...]:
        """The precisions at which the vision encoder is there, the main one first."""
        main = self.manifest.components.get("vision")
        return (main.precision, *self.manifest.alternatives) if main else ()

    def vision(self, precision: str) -> Path:
        """The vision encoder at one of `vision_precisions`; raises BundleError for another."""
        if precision == self.vision_precisions[0]:
            return self.path("vision")
        try:
            return self.folder / self.manifest.alternatives[precision].files[0].file
        except KeyError:
            raise BundleError(
                f"{self.folder}: has no {precision} vision encoder, only "
                f"{', '.join(self.vision_precisions)}; `edgevlm export --vision-precision` adds one"
            ) from None

    @property
    def bytes(self) -> int:
        """Size of all components on disk, alternatives included, in bytes."""
        return sum(r.bytes for c in self.manifest.all_components for r in c.files)


def record(
    path: Path, name: str | None = None, progress: Callable[[int], None] | None = None
) -> FileRecord:
    """Hashes a file; `progress` is told the number of bytes read since its last call."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    size = path.stat().st_size
    return FileRecord(name or path.name, size, digest.hexdigest(), _sample(path, size))


def _sample(path: Path, size: int) -> str:
    if size <= WHOLE_BYTES:
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        for i in range(SAMPLES):
            f.seek(i * (size - BLOCK_BYTES) // (SAMPLES - 1))
            digest.update(f.read(BLOCK_BYTES))
    return digest.hexdigest()


def open_bundle(
    folder: str | os.PathLike[str],
    check: Check = "quick",
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Opens a bundle folder and checks its files.

    "quick" compares sizes, the whole hash of files up to 64 MiB and sampled blocks of larger ones;
    "full" hashes every byte. Raises BundleNotFound, BundleCorrupt or BundleTooNew.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    bundle = Bundle(root, manifest)
    done = 0
    for component in manifest.all_components:
        for entry in component.files:
            _check_file(root, entry, check)
            done += entry.bytes
            if progress:
                progress(Progress("verify", done, bundle.bytes, "B"))
    return bundle


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


def _check_file(root: Path, entry: FileRecord, check: Check) -> None:
    path = root / entry.file
    if not path.is_file():
        raise BundleCorrupt(path, "is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "longer than it was"
        raise BundleCorrupt(path, f"is {what} ({size} bytes, expected {entry.bytes})")
    if check == "full" or size <= WHOLE_BYTES:
        same = record(path).sha256 == entry.sha256
    else:
        same = _sample(path, size) == entry.sample
    if not same:
        raise BundleCorrupt(path, "was changed after it was written (its SHA-256 differs)")


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


# Files that a bundle is made of; whatever else lies in its folder stays there.
_OURS = (MANIFEST, "*.onnx", "*.onnx.data", "*.gguf", NEWLINE, TOKENIZER, SPIECE, DECODER_TOKENIZER)
# mkfs makes this in the root of a file system, which may be mounted to take a bundle.
_NOBODYS = "lost+found"


@contextmanager
def writing(destination: Path) -> Iterator[Path]:
    """A temporary folder whose files become the bundle `destination` when the block ends well.

    Whatever ends the block, `destination` is whole or untouched, and nothing else is left. Raises
    BundleError at the start where it cannot be written, where no engine could read it, and where it
    exists and is anything but an empty folder or an older bundle, which is replaced.
    """
    with ExitStack() as stack:
        try:
            check_path(destination.absolute())
            there = _is_there(destination)
            # On the destination's file system, and with the rights that it asks for.
            place = destination if there else destination.parent
            temporary = stack.enter_context(cleanup.temporary_folder(place))
        except OSError as e:
            raise BundleError(
                f"{destination}: cannot be written ({e.strerror or e}); choose another folder"
            ) from None
        yield temporary
        with cleanup.lock:
            if there:
                _move_in(temporary, destination)
            else:
                temporary.rename(destination)


def check_path(folder: Path) -> None:
    """Raises BundleError for a path that the engines, which take theirs in UTF-8, cannot open."""
    try:
        same = str(folder).encode() == os.fsencode(folder)
    except UnicodeEncodeError:
        same = False
    if not same:
        raise BundleError(
            f"{folder}: this path is not UTF-8, and engines open no others; give it another name"
        )


def _is_there(destination: Path) -> bool:
    """True where the folder exists; raises BundleError where something else does, or OSError."""
    try:
        there = stat.S_ISDIR(destination.stat().st_mode)
        held = sorted(os.listdir(destination)) if there else []
    except FileNotFoundError:
        if destination.name == "..":
            raise
        if destination.is_symlink():
            raise BundleError(
                f"{destination}: is a link to a folder that is not there; make the folder first"
            ) from None
        return False
    foreign = [name for name in held if name != _NOBODYS] if MANIFEST not in held else []
    if not there or foreign:
        what = f" (it holds {foreign[0]})" if foreign else ""
        raise BundleError(
            f"{destination}: exists and is not a bundle{what}; choose another folder or remove it"
        )
    return True


def _move_in(new: Path, folder: Path) -> None:
    """Moves a bundle's files into a folder that exists, in place of an older bundle's.

    One that is mounted, linked to or somebody's current folder can be filled but not replaced. The
    manifest goes first and comes last: who looks in between finds no bundle, never a mixed one.
    """
    old, fresh = new / "old", sorted(new.iterdir(), key=lambda path: path.name == MANIFEST)
    moves = [(path, old / path.name) for pattern in _OURS for path in folder.glob(pattern)]
    moves += [(path, folder / path.name) for path in fresh]
    old.mkdir()
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        # By what is there and not by a count, which an interrupt can outrun.
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                with suppress(OSError):
                    target.rename(source)
        raise
