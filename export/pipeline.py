"""The export from start to end: read and check everything, then write, compare, and finish."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from edgevlm import family as families
from edgevlm.bundle import (
    FORMAT,
    Bundle,
    FileRecord,
    Manifest,
    record,
    write_manifest,
    writing,
)
from edgevlm.errors import ExportError, SourceError
from edgevlm.export import added_tokens, components, decoder, hub, images, parity, quantize
from edgevlm.export.components import Job, Written
from edgevlm.export.parts import assign
from edgevlm.export.progress import Report, Stage
from edgevlm.export.source import CONFIG, Checkpoint, read_checkpoint, stated_license
from edgevlm.family import TOWER, Family, Model, Source
from edgevlm.specs import Fit

_PACKAGES = (
    "edgevlm",
    "gguf",
    "llama-cpp-python",
    "onnx",
    "onnxruntime",
    "optimum",
    "optimum-onnx",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Options:
    """How to export; the words of `export_bundle`."""

    quant: str
    vision_precision: str | Sequence[str]
    verify: bool
    name: str | None
    vision_tower: str | os.PathLike[str] | None = None
    template: str | None = None
    fit: Fit | None = None
    calibration: str | os.PathLike[str] | None = None


def run(
    source: str | os.PathLike[str], out: Path, options: Options, report: Report | None
) -> Bundle:
    """Exports `source` to `out`; see `export_bundle`."""
    job = prepare(source, options, report)
    verify = options.verify and parity.available()
    components.check_disk(job, out)
    if verify:
        parity.check_memory(job)
    try:
        return _write(job, out, verify)
    except OSError as e:
        raise ExportError(
            f"{out}: the export stopped ({e.strerror or e}); make room or choose another folder"
        ) from e


def _write(job: Job, out: Path, verify: bool) -> Bundle:
    with writing(out) as folder:
        manifest = _manifest(job, components.write(job, folder), folder)
        write_manifest(folder, manifest)
        if verify:
            manifest = replace(manifest, parity=parity.verify(job, folder))
            write_manifest(folder, manifest)
    return Bundle(out, manifest)


def prepare(source: str | os.PathLike[str], options: Options, report: Report | None) -> Job:
    """Everything that can be checked before the first byte is written; raises ExportError."""
    quant = quantize.quant(options.quant)
    vision = quantize.vision_precisions(options.vision_precision)
    calibration = Path(options.calibration) if options.calibration else None
    images.check_folder(calibration)
    folder, name = hub.locate(source, report)
    checkpoint = with_tower(read_checkpoint(folder), options, report)
    family, model = describe(checkpoint, options.template, options.fit)
    parts = assign(checkpoint, family, model)
    wanted = options.name or name
    return Job(checkpoint, family, model, parts, quant, vision, wanted, report, calibration)


def with_tower(checkpoint: Checkpoint, options: Options, report: Report | None) -> Checkpoint:
    """The checkpoint, with the vision tower of another folder where the user or it names one."""
    family = _family(checkpoint)
    if family.tower is None:
        if options.vision_tower:
            raise SourceError(f"{checkpoint.folder}: a {family.name} has its own vision tower")
        return checkpoint
    wanted = options.vision_tower or family.tower(_source(checkpoint))
    if not wanted:
        return checkpoint
    try:
        folder, _ = hub.locate(wanted, report)
    except SourceError as e:
        raise SourceError(f"{e} (the vision tower; --vision-tower names another)") from None
    return replace(checkpoint, tower=read_checkpoint(folder, tokenizer=False))


def _source(checkpoint: Checkpoint, template: str | None = None, fit: Fit | None = None) -> Source:
    files, tower = dict(checkpoint.configs), checkpoint.tower
    if tower:
        files |= {TOWER + name: config for name, config in tower.configs.items()}
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return Source(files, shapes, template, fit, added_tokens.describe(checkpoint))


def _family(checkpoint: Checkpoint) -> Family:
    path, config = checkpoint.folder / CONFIG, checkpoint.configs[CONFIG]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path}: has no 'model_type'; name the folder of a whole checkpoint")
    return families.by_model_type(model_type, str(path))


def describe(
    checkpoint: Checkpoint, template: str | None = None, fit: Fit | None = None
) -> tuple[Family, Model]:
    """The family of a checkpoint and what its config means; raises UnknownFamily, SourceError."""
    path, family = checkpoint.folder / CONFIG, _family(checkpoint)
    try:
        return family, family.describe(_source(checkpoint, template, fit))
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError) as e:
        raise SourceError(f"{path}: is not a config of a {family.name} ({e!r})") from None


def _manifest(job: Job, written: Written, folder: Path) -> Manifest:
    return Manifest(
        format=FORMAT,
        family=job.family.name,
        name=job.name,
        license=stated_license(job.checkpoint.folder) or job.family.license,
        components=written.components,
        alternatives=written.alternatives,
        image=job.model.image,
        prompt=job.model.prompt,
        decoder=job.model.decoder,
        answer=job.model.answer,
        token_embedding=decoder.embedding_place(folder / decoder.FILE),
        source=_source_records(job),
        versions=_versions(),
    )


def _source_records(job: Job) -> tuple[FileRecord, ...]:
    files = [(f, f.name) for f in job.checkpoint.files]
    if tower := job.checkpoint.tower:
        files += [(f, TOWER + f.name) for f in tower.files]
    stage = Stage(job.report, "hash source", sum(f.stat().st_size for f, _ in files), "B")
    return tuple(record(f, name, progress=stage.advance) for f, name in files)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
