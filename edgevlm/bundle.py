"""The bundle: one folder that holds a converted model and says everything about it.

    edgevlm.json     the manifest (edgevlm/manifest.py)
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
ONNX weights lie beside the graph in files named in the manifest. This module knows files and
hashes; it does not know what an engine makes of them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgevlm import cleanup
from edgevlm.errors import BundleCorrupt, BundleError
from edgevlm.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from edgevlm.types import Progress

NEWLINE = "projector.newline.npy"
INPUT = "decoder.input.gguf"
DECODER_TOKENIZER = "decoder.tokenizer.json"
REGIONS, REGION_ROWS = "regions.onnx", "regions.rows.onnx"
# The tokenizer of a dual encoder: one for the package tokenizers, or SentencePiece's.
TOKENIZER, SPIECE = "text.tokenizer.json", "text.spiece.model"

# Files up to this size are hashed whole on every load; of larger ones the cheap check reads
# SAMPLES blocks, evenly spread, so that a bundle of gigabytes opens in milliseconds.
WHOLE_BYTES = 64 << 20
SAMPLES = 64
BLOCK_BYTES = 64 << 10

Check = Literal["quick", "full"]


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
