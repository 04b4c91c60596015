"""The export from start to end: read and check everything, then write, compare, and finish."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from edgevlm.bundle import Bundle, record
from edgevlm.errors import SourceError
from edgevlm.export import components, dual, languages, masks, requantize
from edgevlm.export.checkpoint import adapters, hub, published
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.assembly import family_of, read_source
from edgevlm.export.checkpoint.chats import read_chats
from edgevlm.export.checkpoint.published import ANY, Choice, Published
from edgevlm.export.checkpoint.source import (
    CONFIG,
    FAST,
    TOKENIZER,
    TOKENIZERS,
    Checkpoint,
    read_checkpoint,
    read_configs,
    read_present,
    read_settings,
    stated_license,
)
from edgevlm.export.checkpoint.tensor_map import TensorMap, assign
from edgevlm.export.checkpoint.tokenizer import side_files
from edgevlm.export.checkpoint.tokenizer.vocabulary import Vocabulary, read_vocabulary
from edgevlm.export.components import Job, Written
from edgevlm.export.gguf import decoder, mmproj, ready
from edgevlm.export.gguf.ready import ReadyDecoder
from edgevlm.export.options import (
    AS_FOUND,
    PUT_TOGETHER,
    UNCOMPARED,
    Location,
    ReadOptions,
    WriteOptions,
)
from edgevlm.export.parity import compare, images
from edgevlm.family import TOWER, Family, FileError, Model, Source
from edgevlm.manifest import FORMAT, FileRecord, Manifest, write_manifest
from edgevlm.parts import uneven_heads
from edgevlm.processors import PROCESSORS
from edgevlm.progress import Report, Stage
from edgevlm.spec_bounds import out_of_bounds
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
    if write.segment_decoder:
        masks.read(write.segment_decoder)
    with components.destination(out) as folder:
        place, name = hub.locate(source, report, Choice(write.quant.name, write.insists))
        if dual.found(place):
            pair = dual.read(place, _checked_name(options.name or name), options, report)
            return dual.run(pair, out, folder, write, verified)
        job = read(source, options, report, Choice(write.quant.name, write.insists))
        if write.segment_decoder and "segment" not in job.model.prompt.tasks:
            raise SourceError(
                f"{write.segment_decoder}: {job.name} has no task 'segment', so that it says no "
                "masks that this file decodes; leave it out"
            )
        if write.languages and job.model.own_tokenizer:
            raise SourceError(languages.OWN_TOKENIZER.format(job.name))
        if job.ready:
            verified, write = False, _as_published(job.ready, write)
        components.check_disk(job, write, out, folder)
        if verified:
            compare.check_memory(job)
        manifest = _manifest(job, components.write(job, write, folder), folder)
        if write.verify is None and not verified and not job.ready:
            manifest = replace(manifest, notes=(*manifest.notes, UNCOMPARED))
        write_manifest(folder, manifest)
        if write.imatrix:
            unquantized = Bundle(folder, manifest)
            manifest = requantize.quantized(unquantized, folder, write, report)
            write_manifest(folder, manifest)
        if write.languages:
            manifest = languages.trimmed(manifest, folder, write.languages, report)
            write_manifest(folder, manifest)
        if verified:
            manifest = replace(manifest, parity=compare.verify(job, write, folder))
            write_manifest(folder, manifest)
        return Bundle(out, manifest)


def _as_published(decoder: ReadyDecoder, write: WriteOptions) -> WriteOptions:
    """Options for a decoder that is taken as it is; raises SourceError for those that need the
    original's weights.
    """
    for asked, option in (
        (write.verify, "--verify"),
        (write.imatrix and not write.quant.imatrix, "--imatrix"),
    ):
        if asked:
            raise SourceError(
                f"{decoder.path}: {option} needs the original's weights; leave it out, or name the "
                "original checkpoint"
            )
    if write.insists and write.quant != decoder.quant:
        raise SourceError(f"{decoder.path}: is in {decoder.quant.name}, not in {write.quant.name}")
    return replace(write, quant=decoder.quant, imatrix=False)


def read(
    source: Location,
    options: ReadOptions = AS_FOUND,
    report: Report | None = None,
    choice: Choice = ANY,
) -> Job:
    """Reads and checks all of a source but the values of its tensors; raises SourceError.

    `choice` is for a source with several published decoders.
    """
    folder, name = hub.locate(source, report, choice)
    if files := published.find(folder, choice):
        return _read_published(folder, files, _checked_name(options.name or name), options, report)
    folder, adapter = adapters.find(folder, options.adapter, report)
    given = {part: Path(path) for part, path in options.parts.items()}
    checkpoint = with_tower(read_source(folder, given, adapter), options, report)
    checkpoint = with_tokenizer(checkpoint, options, report)
    family, model = describe(checkpoint, options)
    if not family.weight_files:
        adapter = adapter or adapters.projector_beside(checkpoint, family.locate)
        used = (*checkpoint.files, *(adapter.files if adapter else ()))
        model = replace(model, notes=(*model.notes, *adapters.left_over(checkpoint.folder, used)))
    tensors = assign(checkpoint, family, model, adapter)
    vocabulary = read_vocabulary(checkpoint.tokenizer, model)
    if adapter and adapter.folder != checkpoint.folder:
        _check_beside(adapter, checkpoint, model, vocabulary, options)
    model = replace(model, answer=_resolved(model, vocabulary))
    name = _checked_name(options.name or name)
    return Job(checkpoint, family, model, tensors, vocabulary, name, options, adapter, report)


def _read_published(
    folder: Path, files: Published, name: str, options: ReadOptions, report: Report | None
) -> Job:
    """A job of GGUF files in a folder, with the settings beside them or those of the original."""
    if options.adapter or options.parts or options.vision_tower:
        raise SourceError(
            f"{folder}: adapters, weight files and towers cannot be joined with GGUF files; name "
            "the original checkpoint"
        )
    settings = hub.settings_of(folder, report)
    paths = (folder / files.decoder, folder / files.mmproj)
    configs = {**read_chats(settings), **read_configs(settings)}
    checkpoint = Checkpoint(settings, configs, {}, paths)
    family = family_of(checkpoint)
    if family.weight_files or (family.tower and family.tower(_source(checkpoint, options))):
        raise SourceError(
            f"{settings}: does not say all of its vision tower; name the original checkpoint"
        )
    if family.tokenizer:
        raise SourceError(
            f"{folder}: published GGUF files of a {family.name} are not read; name the original "
            "checkpoint"
        )
    family, model = describe(with_tower(checkpoint, options, report), options)
    parts = mmproj.read(paths[1], model)
    vocabulary = read_vocabulary(checkpoint, model)
    found = ready.read(paths[0], model.text, vocabulary)
    tensors = TensorMap({**parts, "decoder": ready.expected(paths[0], model.text)})
    model = replace(
        model,
        answer=_resolved(model, vocabulary),
        notes=(*model.notes, _put_together(files, settings)),
    )
    return Job(
        checkpoint, family, model, tensors, vocabulary, name, options, report=report, ready=found
    )


def _put_together(files: Published, settings: Path) -> str:
    origin = hub.origin(settings.resolve())
    return (
        f"{PUT_TOGETHER} ({files.decoder}, {files.mmproj}) and the settings of "
        f"{origin or settings.name}; not compared with the original, whose weights were not read"
    )


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


def with_tokenizer(
    checkpoint: Checkpoint, options: ReadOptions, report: Report | None
) -> Checkpoint:
    """The checkpoint, with the tokenizer of another folder where its original reads that."""
    family = family_of(checkpoint)
    wanted = family.tokenizer(_source(checkpoint, options)) if family.tokenizer else None
    if not wanted:
        return checkpoint
    try:
        folder, _ = hub.locate(wanted, report)
    except SourceError as e:
        raise SourceError(f"{e} (the tokenizer; --set tokenizer=FOLDER names another)") from None
    found = read_settings(folder, (FAST, side_files.CONFIG))
    if not found or FAST not in found.configs:
        raise SourceError(f"{folder}: has no {FAST}; name the tokenizer's folder (--set tokenizer)")
    return replace(checkpoint, extra={**checkpoint.extra, TOKENIZER: found})


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
        side_files.describe(checkpoint.tokenizer),
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
    problem = out_of_bounds(model.image, model.decoder, video=prompt.video)
    if problem := problem or uneven_heads([model.vision, model.projector]):
        raise SourceError(f"{path}: {problem}")
    return family, replace(model, prompt=prompt)


def _path(checkpoint: Checkpoint, file: str) -> Path:
    """The path of a file that a family knows by its key in Source.files."""
    extra, _, name = file.rpartition("/")
    inside = checkpoint.extra.get(extra, checkpoint)
    return inside.folder / name


def _manifest(job: Job, written: Written, folder: Path) -> Manifest:
    # Published files come first: their settings may be of another repository.
    folders = (*((job.ready.path.parent,) if job.ready else ()), job.checkpoint.folder)
    return Manifest(
        format=FORMAT,
        family=job.family.name,
        name=job.name,
        license=next(filter(None, map(stated_license, folders)), job.family.license),
        components=written.components,
        alternatives=written.alternatives,
        image=job.model.image,
        prompt=job.model.prompt,
        decoder=job.model.decoder,
        answer=job.model.answer,
        token_embedding=decoder.embedding_location(folder / decoder.FILE),
        source=_source_records(job),
        versions=versions(),
        weight_files=job.tensors.weight_files,
        notes=(*job.model.notes, *job.tensors.notes),
        origin=hub.origin(folders[0].resolve()),
        self_check=written.self_check,
        regions=job.model.regions,
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


@functools.cache
def versions() -> Mapping[str, str]:
    """The versions of the packages that make a bundle."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
