"""The three components of a bundle, written into a folder one after the other.

Only one part's weights are in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle import Component, record
from edgevlm.errors import ExportError
from edgevlm.export import decoder, images
from edgevlm.export.decoder import DecoderSource
from edgevlm.export.parts import Part, patches
from edgevlm.export.progress import Report, Stage
from edgevlm.export.quantize import Quant, VisionPrecision
from edgevlm.export.source import Checkpoint
from edgevlm.export.tokenizer import read_vocabulary
from edgevlm.family import Family, Model

if TYPE_CHECKING:
    from edgevlm.export.towers import Tower

# A linear map whose 8-bit input would carry more noise than this share of its signal stays in
# float32; each later limit is tried when the features are still too far from their source. Inputs
# without outliers lie near 1e-4, and at the last limit nothing is quantized.
_NOISE_LIMITS = (1e-3, 3e-4, 1e-4, 5e-5, 0.0)
# Room for what the estimate does not count: headers, the tokenizer, rounding to blocks.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """All that one export needs to know, checked."""

    checkpoint: Checkpoint
    family: Family
    model: Model
    parts: Mapping[str, Part]
    quant: Quant
    vision: VisionPrecision
    name: str
    report: Report | None = None


def elements(part: Part) -> int:
    """Number of weights of a part."""
    return sum(t.elements for t in part.values())


def check_disk(job: Job, out: Path) -> None:
    """Raises ExportError when the disk of `out` cannot hold the bundle and its making."""
    need = _disk_bytes(job)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise ExportError(
            f"{out}: the export needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; "
            "make room or choose another folder"
        )


def _disk_bytes(job: Job) -> int:
    vision = elements(job.parts["vision"]) + elements(job.parts["projector"])
    language = elements(job.parts["decoder"])
    # The float32 graph and, beside it, the quantizer's copies of it.
    making_vision = vision * (12 if job.vision.name == "int8" else 8)
    kept = vision * job.vision.bits / 8 + language * job.quant.bits / 8
    stored = sum(f.stat().st_size for f in job.checkpoint.weights)
    making_language = 0 if job.quant.direct else stored
    return int(max(making_vision, kept + making_language)) + _SPARE_BYTES


def write(job: Job, folder: Path) -> dict[str, Component]:
    """Writes every component into `folder`; raises SourceError, ExportError or EngineMissing."""
    work = folder / "work"
    work.mkdir()
    # First the decoder: what a checkpoint lacks shows before torch has to load.
    vocabulary = read_vocabulary(job.checkpoint, job.model)
    source = DecoderSource(job.parts["decoder"], job.model.text, vocabulary, job.name)
    gguf = [decoder.write_decoder(source, folder, job.quant, job.report)]
    vision = _write_vision(job, folder, work)
    projector = _write_projector(job, folder, work)
    shutil.rmtree(work)
    files = {"vision": vision, "projector": projector, "decoder": gguf}
    precisions = {"vision": job.vision.name, "projector": "fp32", "decoder": job.quant.name}
    stage = Stage(
        job.report, "hash", sum(os.path.getsize(f) for g in files.values() for f in g), "B"
    )
    return {
        part: Component(
            precisions[part], tuple(record(path, progress=stage.advance) for path in group)
        )
        for part, group in files.items()
    }


def _write_vision(job: Job, folder: Path, work: Path) -> list[Path]:
    from edgevlm.export import onnx_files, vision

    target, traced = folder / "vision.onnx", work / "vision.onnx"
    stage = Stage(job.report, "vision", len(job.parts["vision"]) + 2, "tensors")
    encoder = vision.build_encoder(job.model.vision, job.parts["vision"], stage)
    vision.trace_encoder(encoder, traced)
    stage.advance(1)
    if job.vision.name == "int8":
        _quantize_vision(job, encoder, traced, target)
    else:
        onnx_files.store(traced, target, job.vision.name)
    stage.advance(1)
    return onnx_files.files(target)


def _quantize_vision(job: Job, encoder: Tower, traced: Path, target: Path) -> None:
    """Quantizes as much as keeps the features within the precision's cosine of float32."""
    from edgevlm.export import onnx_files, vision

    pixels = images.calibration(job.model.image)
    noise = vision.activation_noise(encoder, pixels)
    expected = vision.features(encoder, pixels)
    vision.drop(encoder)
    kept: list[str] | None = None
    for limit in _NOISE_LIMITS:
        loud = sorted(name for name, value in noise.items() if value > limit)
        if loud == kept:
            continue
        kept = loud
        keep = [vision.node_name(name) for name in loud]
        onnx_files.store(traced, target, "int8", keep)
        if distance(onnx_files.run(target, "pixels", pixels), expected) <= job.vision.cosine:
            return


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest 1 - cosine between rows (last axis) of two arrays of one shape."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float((1 - (x * y).sum(-1) / np.maximum(norms, 1e-30)).max())


def _write_projector(job: Job, folder: Path, work: Path) -> list[Path]:
    from edgevlm.export import onnx_files, vision

    target, traced = folder / "projector.onnx", work / "projector.onnx"
    stage = Stage(job.report, "projector", len(job.parts["projector"]) + 1, "tensors")
    projector = vision.build_projector(job.model.projector, job.parts["projector"], stage)
    vision.trace_projector(projector, job.model.projector, patches(job.model.vision), traced)
    onnx_files.store(traced, target, "fp32")
    stage.advance(1)
    return onnx_files.files(target)
