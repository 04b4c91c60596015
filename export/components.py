"""The three components of a bundle, written into a folder one after the other.

Only one part's weights are in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle import NEWLINE, record, writing
from edgevlm.errors import ExportError
from edgevlm.export import masks, self_check
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.source import Checkpoint
from edgevlm.export.checkpoint.tensor_map import TensorMap
from edgevlm.export.checkpoint.tensors import DTYPES, Weights
from edgevlm.export.checkpoint.tokenizer.own import write_own
from edgevlm.export.checkpoint.tokenizer.vocabulary import Vocabulary
from edgevlm.export.gguf import decoder, ready
from edgevlm.export.gguf.decoder import DecoderSource
from edgevlm.export.gguf.ready import ReadyDecoder
from edgevlm.export.options import ReadOptions, WriteOptions
from edgevlm.export.parity import images
from edgevlm.export.parts import net, regions
from edgevlm.export.precisions import VisionPrecision
from edgevlm.family import Family, Model
from edgevlm.manifest import Component
from edgevlm.parts import Part
from edgevlm.progress import Report, Stage
from edgevlm.specs import SelfCheck

# Room for what the estimate does not count: headers, the tokenizer, rounding to blocks.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """One source, read and checked; `adapter` is merged into its checkpoint, `ready` a published
    decoder, whose tensors are taken as they are.
    """

    checkpoint: Checkpoint
    family: Family
    model: Model
    tensors: TensorMap
    vocabulary: Vocabulary
    name: str
    options: ReadOptions
    adapter: Adapter | None = None
    report: Report | None = None
    ready: ReadyDecoder | None = None

    @property
    def parts(self) -> Mapping[str, Weights]:
        """The tensors of "vision", "projector" and "decoder" by canonical name."""
        return self.tensors.parts


def elements(part: Weights) -> int:
    """Number of weights of a part."""
    return sum(t.elements for t in part.values())


@contextmanager
def destination(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes the bundle `out`, as `bundle.writing` has it; what the system
    refuses on the way becomes an ExportError.
    """
    try:
        with writing(out) as folder:
            yield folder
    except OSError as e:
        reason = f"{e.strerror or e}: {e.filename}" if e.filename else e.strerror or e
        raise ExportError(
            f"{out}: the export stopped ({reason}); make room or choose another folder"
        ) from e


def check_disk(job: Job, options: WriteOptions, out: Path, folder: Path) -> None:
    """Raises ExportError when the disk of `folder` cannot hold the bundle and its making."""
    check_room(out, folder, _disk_bytes(job, options))


def check_room(out: Path, folder: Path, need: int) -> None:
    """Raises ExportError when the disk of `folder` cannot take the `need` bytes of an export."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ExportError(
            f"{out}: the export needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; "
            "make room or choose another folder"
        )


def _disk_bytes(job: Job, options: WriteOptions) -> int:
    vision = elements(job.parts["vision"]) + elements(job.parts["projector"])
    vision += elements(job.parts.get("regions", {}))
    language = elements(job.parts["decoder"])
    # The float32 graph and, beside it, what quantizers make of it on their way.
    making_vision = vision * 12
    kept = vision * sum(v.bits for v in options.vision) / 8 + language * options.quant.bits / 8
    # The decoder before it is quantized, every matrix as its source has it.
    stored = sum(t.elements * DTYPES[t.dtype].itemsize for t in job.parts["decoder"].values())
    making_language = 0 if options.quant.direct or job.ready else stored
    if options.languages:
        # A decoder beside the one that it is cut from.
        making_language = max(making_language, int(language * options.quant.bits / 8))
    return int(max(making_vision, kept + making_language)) + _SPARE_BYTES


@dataclass(frozen=True)
class Written:
    """The components in a folder, the further vision encoders by precision, and what machines check
    themselves with.
    """

    components: Mapping[str, Component]
    alternatives: Mapping[str, Component]
    self_check: SelfCheck | None = None


def write(job: Job, options: WriteOptions, folder: Path) -> Written:
    """Writes every component into `folder`, the decoder unquantized where it takes an importance
    matrix; raises SourceError, ExportError or EngineMissing.
    """
    work = folder / "work"
    work.mkdir()
    source = DecoderSource(job.parts["decoder"], job.model.text, job.vocabulary, job.name)
    if job.ready:
        gguf, stored = folder / decoder.FILE, job.ready.quant.name
        ready.copy(job.ready, source, gguf, job.report)
    elif options.imatrix:
        # The model has to answer before it is quantized.
        gguf, stored = folder / decoder.FILE, source.precision
        decoder.write_gguf(source, gguf, None, job.report)
    else:
        gguf = decoder.write_decoder(source, folder, options.quant, job.report)
        stored = options.quant.name
    vision = _write_vision(job, options, folder, work)
    precision, projector = _write_projector(job, options, folder, work)
    check = _self_check(job, options, folder, work)
    shutil.rmtree(work)
    own = [write_own(job.checkpoint.tokenizer, folder)] if job.model.own_tokenizer else []
    parts = {"projector": (precision, projector), "decoder": (stored, [gguf, *own])}
    if job.model.region_model:
        found = regions.write(job.model.region_model, job.parts["regions"], folder, job.report)
        parts["regions"] = ("fp32", found)
    if options.segment_decoder:
        tensors = masks.read(options.segment_decoder)
        parts["masks"] = ("fp32", [masks.write(tensors, folder, job.report)])
    return replace(hashed(parts, vision, job.report), self_check=check)


def _self_check(job: Job, options: WriteOptions, folder: Path, work: Path) -> SelfCheck:
    """Numbers of the float32 graphs, which lie in `work`, but a projector that stays float32."""
    projector, image = folder / "projector.onnx", job.model.image
    stage = Stage(job.report, "self-check", 1 + len(options.vision), "encoders")
    whole = work / projector.name
    right = self_check.numbers(work / "vision.onnx", whole if whole.exists() else projector, image)
    stage.advance(1)
    for i, precision in enumerate(options.vision):
        made = [(precision, folder / vision_file(i, precision))]
        right = self_check.with_tolerances(right, made, projector, image, right.tolerances)
        stage.advance(1)
    return right


def hashed(
    parts: Mapping[str, tuple[str, list[Path]]],
    vision: Mapping[str, list[Path]],
    report: Report | None,
) -> Written:
    """The records of written files: parts as (precision, files), vision encoders by precision, the
    main one first.
    """
    groups = [*(files for _, files in parts.values()), *vision.values()]
    stage = Stage(report, "hash", sum(os.path.getsize(f) for group in groups for f in group), "B")

    def component(precision: str, files: list[Path]) -> Component:
        return Component(precision, tuple(record(f, progress=stage.advance) for f in files))

    main, *others = (component(precision, files) for precision, files in vision.items())
    named = {name: component(*part) for name, part in parts.items()}
    return Written({"vision": main, **named}, {c.precision: c for c in others})


def _write_vision(
    job: Job, options: WriteOptions, folder: Path, work: Path
) -> dict[str, list[Path]]:
    from edgevlm.export.onnx.write import write

    whole = work / "vision.onnx"
    n_steps = len(job.parts["vision"]) + 1 + len(options.vision)
    stage = Stage(job.report, "vision", n_steps, "tensors")
    config = job.model.vision
    write(config, config.pixels, job.parts["vision"], whole, stage)
    stage.advance(1)
    pixels = images.calibration(job.model.image, options.calibration)
    return write_precisions(whole, folder, options.vision, pixels, stage)


def write_precisions(
    source: Path,
    folder: Path,
    wanted: Sequence[VisionPrecision],
    pixels: NDArray[np.float32],
    stage: Stage,
) -> dict[str, list[Path]]:
    """A float32 encoder at several precisions, the first as vision.onnx; files by precision."""
    from edgevlm.export.onnx import quantize, storage

    made = {}
    for i, precision in enumerate(wanted):
        target = folder / vision_file(i, precision)
        quantize.convert(source, target, precision, pixels)
        made[precision.name] = storage.files(target)
        stage.advance(1)
    return made


def vision_file(i: int, precision: VisionPrecision) -> str:
    """The name of the i-th vision encoder of a bundle."""
    return "vision.onnx" if i == 0 else f"vision.{precision.name}.onnx"


def _write_projector(
    job: Job, options: WriteOptions, folder: Path, work: Path
) -> tuple[str, list[Path]]:
    """The projector's precision and files."""
    from edgevlm.export.onnx import quantize, storage
    from edgevlm.export.onnx.write import write

    model, tensors, target = job.model, job.parts["projector"], folder / "projector.onnx"
    quantized, precision = net(model.projector).quantized, options.vision[0]
    whole = work / "projector.onnx" if quantized else target
    stage = Stage(job.report, "projector", len(tensors) + 1, "tensors")
    given = (model.vision.features[0], model.projector.in_features)
    write(model.projector, given, tensors, whole, stage)
    if quantized:
        pixels = images.calibration(model.image, options.calibration)
        features = storage.run(folder / "vision.onnx", "pixels", pixels)
        quantize.convert(whole, target, precision, features)
    stage.advance(1)
    written = [*storage.files(target), *write_newline(model.projector, tensors, folder)]
    return precision.name if quantized else "fp32", written


def write_newline(config: Part, tensors: Weights, folder: Path) -> list[Path]:
    """Writes a connector's newline beside its graph; the file, if it has one."""
    if not (rows := net(config).rows):
        return []
    np.save(folder / NEWLINE, rows(config, tensors))
    return [folder / NEWLINE]
