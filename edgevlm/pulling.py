"""From a name to an installed model: look up, check, download, export, put in its place.

A repository that holds a bundle is downloaded as it is; of another the checkpoint, or the GGUF
files of one that has nothing else, which are then exported. Whatever ends a pull, the model is
whole or absent, and the same pull goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgevlm import catalogue, cleanup, machine, store
from edgevlm.bundle import Bundle, check_path, open_bundle
from edgevlm.errors import BundleError, EngineMissing, HubError, SourceError
from edgevlm.export import targets
from edgevlm.hub import cache, download
from edgevlm.hub.repository import RemoteFile, Repository, look_up, parse
from edgevlm.manifest import MANIFEST, read_manifest
from edgevlm.models import directory, installed
from edgevlm.types import Progress

# A bundle beside its weights, with room for what an export writes on its way: the float32 graph of
# a vision tower, which is 4 to 12 percent of the models in the catalogue, and its quantized copies.
_BUNDLE_SHARE = 0.9


@dataclass(frozen=True)
class Precisions:
    """The precisions of an export, as `export_bundle` takes them; empty where not asked for."""

    target: str | None = None
    quant: str | None = None
    vision: tuple[str, ...] = ()

    @property
    def asked(self) -> bool:
        """True where any was named."""
        return bool(self.target or self.quant or self.vision)


@dataclass(frozen=True)
class Pull:
    """A pull that was looked up and checked; nothing of it is downloaded yet.

    `name` is what the model will go by, `files` those to download, `ready` whether they are a
    bundle, `missing` the bytes of them that are not on this machine. `folder` is what the hub's
    cache holds where the hub cannot be reached.
    """

    name: str
    repository: Repository
    revision: str | None
    files: tuple[RemoteFile, ...]
    ready: bool
    missing: int
    entry: catalogue.CatalogueEntry | None = None
    folder: Path | None = None

    @property
    def published(self) -> bool:
        """True where its weights are GGUF files."""
        return any(f.name.endswith(".gguf") for f in self.files) and not self.ready

    @property
    def origin(self) -> str:
        """Repository and commit, `org/name@COMMIT`."""
        return f"{self.repository.id}@{self.repository.commit}"


def pull(
    model: str,
    *,
    name: str | None = None,
    target: str | None = None,
    quant: str | None = None,
    vision_precision: str | Sequence[str] = (),
    verify: bool | None = None,
    keep_checkpoint: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Downloads a model, exports it where it has to be, and installs it under a short name.

    `model` is a name of the catalogue or `org/name[@revision]` on the hub, `name` what it will go
    by here. The precisions and `verify` are `export_bundle`'s; a repository that holds a bundle has
    its own. Without `keep_checkpoint` the checkpoint that was downloaded for it is removed from the
    hub's cache. A model that is here already is returned as it is.

    >>> bundle = edgevlm.pull("smolvlm-256m")
    >>> vlm = edgevlm.load("smolvlm-256m")
    >>> vlm.close()

    Raises HubError, SourceError, EngineMissing without the packages that an export needs, and
    ExportError or BundleError where it cannot be written.
    """
    several = (vision_precision,) if isinstance(vision_precision, str) else tuple(vision_precision)
    wanted = Precisions(target, quant, several)
    plan = prepare(model, wanted, name=name)
    return carry_out(
        plan, wanted, verify=verify, keep_checkpoint=keep_checkpoint, progress=progress
    )


def prepare(model: str, wanted: Precisions = Precisions(), *, name: str | None = None) -> Pull:
    """Looks a model up and checks what a pull of it needs: access, packages, room.

    `wanted` chooses among several published decoders.
    """
    entry = catalogue.entry(model)
    repo, revision = (entry.repo, entry.revision) if entry else _parsed(model)
    short = store.check_name(name or (entry.name if entry else repo.split("/")[1]))
    check_path(directory().absolute())
    try:
        repository = look_up(repo, revision)
    except HubError:
        folder = download.cached(repo, revision)
        if folder is None or not any(_has_weights(path.name) for path in folder.iterdir()):
            raise
        repository = Repository(repo, folder.name, ())
        return Pull(short, repository, revision, (), False, 0, entry, folder)
    ready = MANIFEST in repository.names
    files = _bundle_files(repository) if ready else _checkpoint_files(repository, wanted)
    size = sum(f.bytes for f in files)
    missing = size if ready else download.missing_bytes(repository, files)
    if ready:
        _check_room(short, repo, 0, size)
    else:
        _check_room(short, repo, missing, entry.bundle if entry else int(size * _BUNDLE_SHARE))
    return Pull(short, repository, revision, tuple(files), ready, missing, entry)


def _parsed(model: str) -> tuple[str, str | None]:
    if model and os.path.exists(model):
        raise SourceError(f"{model}: is on this machine; `edgevlm export {model} OUT` exports it")
    if found := parse(model):
        return found
    close = catalogue.near(model, catalogue.entries())
    hint = f"perhaps {' or '.join(close)}" if close else "`edgevlm models --all` lists them"
    raise SourceError(
        f"{model!r}: no such model in the catalogue; {hint}, and one on the hub is named org/name"
    )


def _bundle_files(repository: Repository) -> list[RemoteFile]:
    """The manifest and the files that it names."""
    known = {f.name: f for f in repository.files}
    with cleanup.temporary_folder() as folder:
        download.into(folder, repository, [known[MANIFEST]])
        manifest = read_manifest(folder)
    names = [MANIFEST, *(r.file for c in manifest.all_components for r in c.files)]
    if absent := [name for name in names if name not in known]:
        raise HubError(
            f"{repository.id}: lacks {absent[0]} of its bundle; tell its publisher, or export "
            "its checkpoint"
        )
    return [known[name] for name in names]


def _checkpoint_files(repository: Repository, wanted: Precisions) -> list[RemoteFile]:
    from edgevlm.export.checkpoint import hub, published

    chosen = published.Choice(_decoder_precision(wanted), bool(wanted.quant))
    files = hub.wanted(repository, chosen)
    if not any(_has_weights(f.name) for f in files):
        raise SourceError(
            f"{repository.id}: holds neither a bundle nor weights that edgevlm reads "
            "(*.safetensors, pytorch_model*.bin, *.gguf with an mmproj file); name another"
        )
    names = {f.name for f in files}
    if not published.has_weights(names) and not published.has_settings(names):
        _check_original(repository)
    return files


def _check_original(repository: Repository) -> None:
    """Raises SourceError or HubError where the original of published GGUF files is not known or not
    accessible.
    """
    from edgevlm.export.checkpoint import hub
    from edgevlm.export.checkpoint.source import CARD

    with cleanup.temporary_folder() as folder:
        card = [f for f in repository.files if f.name == CARD]
        download.into(folder, repository, card)
        look_up(hub.original_of(folder, repository.id))


def _decoder_precision(wanted: Precisions) -> str:
    return wanted.quant or targets.target(wanted.target or "laptop").quant


def _has_weights(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".gguf"))


def _check_room(name: str, repo: str, cached: int, installed: int) -> None:
    """Raises BundleError where the disks of the hub's cache and of the models cannot take these
    bytes.
    """
    models, hub = (machine.nearest(f) for f in (directory(), download.storage(repo)))
    same = models.stat().st_dev == hub.stat().st_dev
    needs = {models: cached + installed} if same else {hub: cached, models: installed}
    for folder, need in needs.items():
        free = shutil.disk_usage(folder).free
        if free < need:
            raise BundleError(
                f"{name}: needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; "
                "make room (`edgevlm du` says what is here), or let EDGEVLM_HOME and HF_HOME name "
                "folders on other disks"
            )


def carry_out(
    plan: Pull,
    wanted: Precisions = Precisions(),
    *,
    verify: bool | None = None,
    keep_checkpoint: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Does what was planned; waits while another process pulls the same name."""
    if plan.ready and wanted.asked:
        raise SourceError(
            f"{plan.repository.id}: is a bundle, with precisions of its own; pull it without any, "
            "then `edgevlm requantize`"
        )
    with store.locked(plan.name):
        if found := _installed(plan, wanted):
            return found
        work = store.on_its_way(plan.name)
        bundle = work / "bundle"
        if plan.ready:
            bundle.mkdir(exist_ok=True)
            download.into(bundle, plan.repository, plan.files, progress)
            open_bundle(bundle, check="full", progress=progress)
        else:
            _export(plan, wanted, bundle, verify, progress)
        folder = store.install(bundle, plan.name)
        if store.default() is None and not read_manifest(folder).text:
            store.set_default(plan.name)
    if not keep_checkpoint and plan.missing:
        remove_checkpoint(plan.repository.id, plan.repository.commit)
    return open_bundle(folder)


def _installed(plan: Pull, wanted: Precisions) -> Bundle | None:
    """The model where it is here as it is wanted; raises BundleError where another has its name."""
    folder = installed().get(plan.name)
    if folder is None:
        return None
    try:
        bundle = open_bundle(folder)
    except BundleError:
        return None  # A broken one is replaced.
    manifest = bundle.manifest
    if manifest.origin.partition("@")[0] != plan.repository.id:
        whence = manifest.origin or "made here"
        raise BundleError(
            f"{plan.name}: is another model ({whence}); --name gives this one another name, or "
            f"`edgevlm rm {plan.name}` first"
        )
    same = manifest.origin == plan.origin and _fits(bundle, wanted, plan.published)
    return bundle if same else None


def _fits(bundle: Bundle, wanted: Precisions, published: bool) -> bool:
    """True for a bundle as it is wanted; a published decoder is so where none was named."""
    if not wanted.asked:
        return True
    vision = wanted.vision or targets.target(wanted.target or "laptop").vision
    if bundle.manifest.text:
        return bundle.vision_precisions == vision
    decoder = bundle.manifest.components["decoder"].precision
    same = decoder == _decoder_precision(wanted) or (published and not wanted.quant)
    return same and bundle.vision_precisions == vision


def _export(
    plan: Pull,
    wanted: Precisions,
    bundle: Path,
    verify: bool | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    from edgevlm.export import export_bundle

    _check_packages(plan, verify)
    repository = plan.repository
    with store.locked(store.checkpoint_key(repository.id, repository.commit)):
        folder = plan.folder or _checkpoint(plan, progress)
        for path in bundle.parent.iterdir():
            shutil.rmtree(path)  # of an attempt that was killed
        export_bundle(
            folder,
            bundle,
            target=wanted.target,
            quant=wanted.quant,
            vision_precision=wanted.vision,
            verify=verify,
            name=plan.name,
            progress=progress,
        )


def _checkpoint(plan: Pull, progress: Callable[[Progress], None] | None) -> Path:
    """The folder of the checkpoint in the hub's cache; notes one that was not there."""
    repository = plan.repository
    there = download.storage(repository.id) / "snapshots" / repository.commit
    if not there.is_dir():
        store.note_checkpoint(repository.id, repository.commit)
    return download.snapshot(repository, plan.files, revision=plan.revision, report=progress)


def _check_packages(plan: Pull, verify: bool | None) -> None:
    """Raises EngineMissing before a download whose export would miss torch or transformers."""
    from edgevlm.export.parity.compare import wanted

    if verify and plan.published:
        raise SourceError(
            f"{plan.repository.id}: has GGUF files alone, and there is nothing to compare them "
            "with; leave out --verify"
        )
    wanted(verify)
    if any(f.name.endswith(".bin") for f in plan.files) and find_spec("torch") is None:
        raise EngineMissing(
            f"{plan.repository.id}: its weights are in torch's format, and torch is not there",
            'pip install "edgevlm[export]" (a gigabyte or more)',
        )


def remove_checkpoint(repo: str, commit: str) -> int:
    """Removes a pulled checkpoint from the hub's cache, once nobody exports it; returns the bytes
    that this freed.
    """
    with store.locked(store.checkpoint_key(repo, commit)):
        freed = cache.remove_checkpoint(repo, commit)
        store.forget_checkpoint(repo, commit)
    return freed
