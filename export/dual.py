"""A dual encoder's checkpoint -> a bundle: read and check everything, then write and compare."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from edgevlm import dual
from edgevlm.bundle import Bundle, record
from edgevlm.dual import CONFIG, OPEN_CLIP, DualFamily, DualModel
from edgevlm.errors import ExportError, SourceError
from edgevlm.export import self_check
from edgevlm.export.checkpoint import hub
from edgevlm.export.checkpoint.source import (
    FAST,
    Checkpoint,
    read_checkpoint,
    read_json,
    read_open_clip,
    read_present,
    stated_license,
)
from edgevlm.export.checkpoint.tensor_map import assign_dual, at
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.checkpoint.tokenizer.texts import SPECIAL, TextFile, read_texts
from edgevlm.export.components import (
    check_room,
    elements,
    hashed,
    vision_file,
    write_precisions,
)
from edgevlm.export.options import AS_FOUND, UNCOMPARED, ReadOptions, WriteOptions
from edgevlm.export.parity import corpus, images
from edgevlm.export.precisions import VisionPrecision
from edgevlm.family import FileError, Source
from edgevlm.manifest import FORMAT, Manifest, write_manifest
from edgevlm.parts import uneven_heads
from edgevlm.progress import Report, Stage
from edgevlm.spec_bounds import out_of_bounds
from edgevlm.specs import SelfCheck, TextSpec
from edgevlm.texts import Ids, TextTokens

TEXT = "text.onnx"
# Room for what the estimate does not count.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class DualJob:
    """One checkpoint, read and checked: tensors of "vision" and "text" by canonical name."""

    checkpoint: Checkpoint
    family: DualFamily
    model: DualModel
    parts: dict[str, Weights]
    texts: TextFile
    name: str
    report: Report | None = None


def found(folder: Path) -> DualFamily | None:
    """The layout of a folder's checkpoint, None where it is not a dual encoder's; raises
    SourceError for one that nobody here reads.
    """
    present = [name for name in (CONFIG, OPEN_CLIP) if (folder / name).is_file()]
    try:
        return dual.find({name: read_json(folder / name) for name in present})
    except ValueError as e:
        raise SourceError(f"{folder / CONFIG}: {e}") from None


def read(
    folder: Path, name: str, options: ReadOptions = AS_FOUND, report: Report | None = None
) -> DualJob:
    """Reads and checks all of a checkpoint but the values of its tensors; raises SourceError."""
    family = found(folder)
    assert family
    _refuse(folder, family, options)
    checkpoint = (
        read_open_clip(folder)
        if not family.model_types
        else read_checkpoint(folder, tokenizer=False)
    )
    beside = read_present(folder, (SPECIAL, FAST))
    checkpoint = replace(checkpoint, configs={**checkpoint.configs, **beside})
    shapes = {n: t.shape for n, t in checkpoint.tensors.items()}
    path = checkpoint.folder / (CONFIG if family.model_types else OPEN_CLIP)
    try:
        model = family.describe(Source(checkpoint.configs, shapes))
    except FileError as e:
        raise SourceError(f"{folder / e.file}: {e}") from None
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    parts = [model.vision.tower, model.vision.head, model.tower]
    if problem := out_of_bounds(model.image, None) or uneven_heads(parts):
        raise SourceError(f"{path}: {problem}")
    tensors = assign_dual(checkpoint, family, model)
    texts = read_texts(folder, checkpoint.configs, model.text)
    if texts.size > model.tower.vocab_size:
        raise SourceError(
            f"{texts.files[0]}: has {texts.size} tokens, the text tower {model.tower.vocab_size}; "
            "it is another model's tokenizer"
        )
    texts = replace(texts, spec=_scored(texts.spec, tensors.pop("score"), checkpoint))
    return DualJob(checkpoint, family, model, tensors, texts, options.name or name, report)


def _refuse(folder: Path, family: DualFamily, options: ReadOptions) -> None:
    given = {
        "--vision-tower": options.vision_tower,
        "--template": options.template,
        "--image-fit": options.image_fit,
        "--part": options.parts,
        "--set": options.settings,
        "--adapter": options.adapter,
    }
    for option, value in given.items():
        if value:
            raise SourceError(f"{folder}: a {family.name} takes no {option}; leave it out")


def _scored(spec: TextSpec, numbers: Weights, checkpoint: Checkpoint) -> TextSpec:
    """The spec with the two numbers of a score."""
    wanted = ("logit_scale", "logit_bias") if spec.sigmoid else ("logit_scale",)
    if absent := [name for name in wanted if name not in numbers]:
        raise SourceError(f"{checkpoint.folder}: lacks the tensor {absent[0]}; download it again")
    values = {}
    for name, tensor in numbers.items():
        if tensor.elements != 1:
            raise SourceError(f"{at(tensor)} has shape {list(tensor.shape)}; one number is known")
        values[name] = float(tensor.float32().reshape(-1)[0])
    return replace(spec, scale=math.exp(values["logit_scale"]), bias=values.get("logit_bias", 0.0))


def run(job: DualJob, out: Path, folder: Path, options: WriteOptions, verified: bool) -> Bundle:
    """Writes the bundle `out`, whose temporary folder is `folder`; compares it where `verified`."""
    for option, given in (
        ("--imatrix", options.imatrix and not options.quant.imatrix),
        ("--languages", options.languages),
        ("--segment-decoder", options.segment_decoder),
    ):
        if given:
            raise ExportError(f"{job.name}: has no decoder, which {option} is for; leave it out")
    weights = sum(map(elements, job.parts.values()))
    kept = sum(v.bits for v in options.vision) / 8
    check_room(out, folder, int(weights * (12 + kept)) + _SPARE_BYTES)
    manifest = _manifest(job, options, folder)
    if options.verify is None and not verified:
        manifest = replace(manifest, notes=(*manifest.notes, UNCOMPARED))
    write_manifest(folder, manifest)
    if verified:
        from edgevlm.export.parity import dual as parity

        manifest = replace(manifest, parity=parity.verify(job, options, folder))
        write_manifest(folder, manifest)
    return Bundle(out, manifest)


def _manifest(job: DualJob, options: WriteOptions, folder: Path) -> Manifest:
    from edgevlm.export.onnx import storage
    from edgevlm.export.pipeline import versions

    job.texts.write(folder)
    work = folder / "work"
    work.mkdir()
    pixels = images.calibration(job.model.image, options.calibration)
    whole = _written(job, "vision", work)
    vision = write_precisions(whole, folder, options.vision, pixels, Stage(None, "", 1, ""))
    check = self_check.numbers(whole, None, job.model.image)
    made_at = [(v, folder / vision_file(i, v)) for i, v in enumerate(options.vision)]
    check = self_check.with_tolerances(check, made_at, None, job.model.image)
    tokens = TextTokens(folder / job.texts.name, job.texts.spec)
    check = text_at(_written(job, "text", work), folder, options.vision[0], tokens, work, check)
    text = [*storage.files(folder / TEXT), folder / job.texts.name]
    shutil.rmtree(work)
    made = hashed({"text": (options.vision[0].name, text)}, vision, job.report)
    notes = list(job.model.notes)
    if options.insists:
        notes.append(f"no decoder: quant {options.quant.name} was asked for and is nothing's")
    used = dict.fromkeys((*job.checkpoint.files, *job.texts.files))
    return Manifest(
        format=FORMAT,
        family=job.family.name,
        name=job.name,
        license=stated_license(job.checkpoint.folder) or job.family.license,
        components={role: made.components[role] for role in ("vision", "text")},
        alternatives=made.alternatives,
        image=job.model.image,
        text=job.texts.spec,
        self_check=check,
        source=tuple(record(f) for f in used),
        versions=versions(),
        notes=tuple(notes),
        origin=hub.origin(job.checkpoint.folder.resolve()),
    )


def _written(job: DualJob, role: str, work: Path) -> Path:
    """One side's graph in float32."""
    from edgevlm.export.onnx.write import write

    model, path = job.model, work / f"{role}.onnx"
    config = model.vision if role == "vision" else model.tower
    shape = model.vision.tower.pixels if role == "vision" else (model.tower.tokens,)
    stage = Stage(job.report, role, len(job.parts[role]), "tensors")
    write(config, shape, job.parts[role], path, stage)
    return path


def text_at(
    whole: Path,
    folder: Path,
    precision: VisionPrecision,
    tokens: TextTokens,
    work: Path,
    check: SelfCheck,
) -> SelfCheck:
    """Writes the text tower of a float32 graph at a precision into `folder`; returns the numbers to
    check machines with, those of the text among them.
    """
    from edgevlm.export.onnx import quantize, tables

    numbers = self_check.text_numbers(whole, tokens)
    if precision.name not in ("fp32", "fp16"):  # which halves every weight
        halved = work / "halved.onnx"
        tables.halve(whole, halved)
        whole = halved
    quantize.convert(whole, folder / TEXT, precision, calibration(tokens))
    return self_check.with_text(check, numbers, folder / TEXT, precision, tokens)


def calibration(tokens: TextTokens) -> Ids:
    """The ids of texts on which a text tower is calibrated and judged."""
    texts = [tokens.spec.template.format(word) for word in corpus.LABELS]
    return tokens([*texts, *corpus.corpus()[:24]])
