"""The export from start to end: read and check everything, then write, compare, and finish."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

from edgevlm.bundle import (
    FORMAT,
    Bundle,
    FileRecord,
    Manifest,
    record,
    write_manifest,
)
from edgevlm.errors import SourceError
from edgevlm.export import components, requantize
from edgevlm.export.checkpoint import adapters, hub
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.assembly import family_of, read_source
from edgevlm.export.checkpoint.source import (
    CONFIG,
    FAST,
    TOKENIZERS,
    Checkpoint,
    read_checkpoint,
    read_present,
    read_settings,
    stated_license,
)
from edgevlm.export.checkpoint.tensor_map import assign
from edgevlm.export.checkpoint.tokenizer import side_files
from edgevlm.export.checkpoint.tokenizer.vocabulary import Vocabulary, read_vocabulary
from edgevlm.export.components import Job, Written
from edgevlm.export.gguf import decoder
from edgevlm.export.options import (
    AS_FOUND,
    UNCOMPARED,
    Location,
    ReadOptions,
    WriteOptions,
)
from edgevlm.export.parity import compare, images
from edgevlm.family import TOWER, Family, FileError, Model, Source
from edgevlm.processors import PROCESSORS
from edgevlm.progress import Report, Stage
from edgevlm.specs import AnswerSpec

_TOWER = TOWER.removesuffix("/")
_PACKAGES = (
    "edgevlm",
    "gguf",
    "llama-cpp-python",
    "onnx",
    "onnxruntime",
    "torch",
    "transformers",
)


def run(
    source: Location, out: Path, options: ReadOptions, write: WriteOptions, report: Report | None
) -> Bundle:
    """Exports `source` to `out`; see `export_bundle`."""
    # First of all: what cannot be done is refused before anything is read or computed.
    verified = compare.wanted(write.verify)
    images.check_folder(write.calibration)
    with components.destination(out) as folder:
        job = read(source, options, report)
        components.check_disk(job, write, out, folder)
        if verified:
            compare.check_memory(job)
        manifest = _manifest(job, components.write(job, write, folder), folder)
        if write.verify is None and not verified:
            manifest = replace(manifest, notes=(*manifest.notes, UNCOMPARED))
        write_manifest(folder, manifest)
        if write.imatrix:
            unquantized = Bundle(folder, manifest)
            manifest = requantize.quantized(unquantized, folder, write, report)
            write_manifest(folder, manifest)
        if verified:
            manifest = replace(manifest, parity=compare.verify(job, write, folder))
            write_manifest(folder, manifest)
        return Bundle(out, manifest)


def read(source: Location, options: ReadOptions = AS_FOUND, report: Report | None = None) -> Job:
    """Reads and checks all of a source but the values of its tensors; raises SourceError."""
    folder, name = hub.locate(source, report)
    folder, adapter = adapters.find(folder, options.adapter, report)
    given = {part: Path(path) for part, path in options.parts.items()}
    checkpoint = with_tower(read_source(folder, given, adapter), options, report)
    family, model = describe(checkpoint, options)
    if not family.weight_files:
        adapter = adapter or adapters.projector_beside(checkpoint, family.locate)
        used = (*checkpoint.files, *(adapter.files if adapter else ()))
        model = replace(model, notes=(*model.notes, *adapters.left_over(checkpoint.folder, used)))
    tensors = assign(checkpoint, family, model, adapter)
    vocabulary = read_vocabulary(checkpoint, model)
    if adapter and adapter.folder != checkpoint.folder:
        _check_beside(adapter, checkpoint, model, vocabulary, options)
    model = replace(model, answer=_resolved(model, vocabulary))
    name = _checked_name(options.name or name)
    return Job(checkpoint, family, model, tensors, vocabulary, name, options, adapter, report)


def _checked_name(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{name!r}: this name is not UTF-8; choose another (--name)") from None
    return name


def _check_beside(
    adapter: Adapter,
    checkpoint: Checkpoint,
    model: Model,
    vocabulary: Vocabulary,
    options: ReadOptions,
) -> None:
    """Refuses an adapter's folder with a tokenizer or picture processor that is not its base's."""
    folder = adapter.folder
    present = sorted({p.name for p in folder.glob("*config.json")} - {CONFIG})
    other = read_present(folder, present)
    names = PROCESSORS if any(name in other for name in PROCESSORS) else ()
    configs = {n: c for n, c in checkpoint.configs.items() if n not in names} | other
    view = replace(checkpoint, configs=configs)
    if any((folder / name).is_file() for name in TOKENIZERS):
        configs.pop(FAST, None)
        view = replace(view, folder=folder, configs=configs | read_present(folder, (FAST,)))
    found = describe(view, options)[1]
    tokens = [(t.text, t.type) for t in read_vocabulary(view, found).tokens]
    same = tokens == [(t.text, t.type) for t in vocabulary.tokens]
    if found.image != model.image or not same:
        what = "tokenizer" if found.image == model.image else "picture processor"
        raise SourceError(f"{folder}: has a {what} that is not its base's; {adapters.CURE}")


def _resolved(model: Model, vocabulary: Vocabulary) -> AnswerSpec:
    """The answer's spec with the texts that are tokens of this vocabulary."""
    ids = {t.text: i for i, t in enumerate(vocabulary.tokens)}
    stops, penalized = (
        tuple(ids[text] for text in texts if text in ids)
        for texts in (model.stop_pieces, model.penalized_pieces)
    )
    answer = model.answer
    return replace(
        answer,
        stop_tokens=(*stops, *answer.stop_tokens),
        penalized=(*penalized, *answer.penalized),
    )


def with_tower(checkpoint: Checkpoint, options: ReadOptions, report: Report | None) -> Checkpoint:
    """The checkpoint, with the vision tower of another folder where the user or it names one, or
    with what that folder says of pictures.
    """
    family = family_of(checkpoint)
    if family.tower is None:
        if options.vision_tower:
            raise SourceError(f"{checkpoint.folder}: a {family.name} has its own vision tower")
        return checkpoint
    wanted = options.vision_tower or family.tower(_source(checkpoint, options))
    if wanted:
        try:
            folder, _ = hub.locate(wanted, report)
        except SourceError as e:
            raise SourceError(f"{e} (the vision tower; --vision-tower names another)") from None
        return replace(checkpoint, extra={_TOWER: read_checkpoint(folder, tokenizer=False)})
    # The tower is inside, but the original reads pictures as the named one's folder says.
    named = family.processor(_source(checkpoint, options)) if family.processor else None
    settings = read_settings(Path(named), PROCESSORS) if named else None
    return replace(checkpoint, extra={_TOWER: settings}) if settings else checkpoint


def _source(checkpoint: Checkpoint, options: ReadOptions) -> Source:
    files = dict(checkpoint.configs)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for extra, inside in checkpoint.extra.items():
        said = {CONFIG: inside.said} if inside.said else {}
        files |= {f"{extra}/{name}": config for name, config in {**inside.configs, **said}.items()}
        shapes |= {f"{extra}/{name}": tensor.shape for name, tensor in inside.tensors.items()}
    origins = {
        p: inside.weights[0].name for p, inside in checkpoint.extra.items() if inside.weights
    }
    return Source(
        files,
        shapes,
        options.template,
        options.image_fit,
        side_files.describe(checkpoint),
        options.settings,
        origins,
    )


def describe(checkpoint: Checkpoint, options: ReadOptions = AS_FOUND) -> tuple[Family, Model]:
    """The family of a checkpoint and what its config means; raises UnknownFamily, SourceError."""
    family = family_of(checkpoint)
    # Of a model in several files, not all errors are config.json's.
    path = checkpoint.folder if family.weight_files else checkpoint.config_path
    for name in options.settings:
        if name not in family.settings:
            known = ", ".join(family.settings) or "nothing"
            raise SourceError(f"{name!r} cannot be set for a {family.name}; it knows {known}")
    source = _source(checkpoint, options)
    try:
        model = family.describe(source)
    except FileError as e:
        raise SourceError(f"{_path(checkpoint, e.file)}: {e}") from None
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    prompt = replace(model.prompt, normalize=source.tokenizer.normalize)
    return family, replace(model, prompt=prompt)


def _path(checkpoint: Checkpoint, file: str) -> Path:
    """The path of a file that a family knows by its key in Source.files."""
    extra, _, name = file.rpartition("/")
    inside = checkpoint.extra.get(extra, checkpoint)
    return inside.folder / name


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
        token_embedding=decoder.embedding_location(folder / decoder.FILE),
        source=_source_records(job),
        versions=_versions(),
        weight_files=job.tensors.weight_files,
        notes=(*job.model.notes, *job.tensors.notes),
        origin=hub.origin(job.checkpoint.folder.resolve()),
    )


def _source_records(job: Job) -> tuple[FileRecord, ...]:
    files = [(f, f.name) for f in job.checkpoint.files]
    for extra, inside in job.checkpoint.extra.items():
        files += [(f, f"{extra}/{f.name}") for f in inside.files]
    if job.adapter:
        apart = job.adapter.folder != job.checkpoint.folder
        own = [(f, f"adapter/{f.name}" if apart else f.name) for f in job.adapter.files]
        files += [(f, name) for f, name in own if f not in dict(files)]
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
