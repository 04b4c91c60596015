"""From a published checkpoint to a bundle: `export_bundle` is the door.

Importing this package loads nothing heavy; torch, optimum and onnx are needed when an export runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.bundle import Bundle, PieceRecord
from edgevlm.export.quantize import QUANTS, VISION_PRECISIONS
from edgevlm.specs import DecoderSpec, Fit, ImageSpec, PromptSpec
from edgevlm.types import Progress

__all__ = ["QUANTS", "VISION_PRECISIONS", "Inspection", "export_bundle", "inspect_source"]


@dataclass(frozen=True)
class Inspection:
    """What an export would make of a source; `pieces` and `notes` are the manifest's."""

    name: str
    family: str
    image: ImageSpec
    prompt: PromptSpec
    decoder: DecoderSpec
    pieces: tuple[PieceRecord, ...]
    notes: tuple[str, ...]


def export_bundle(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str = "q4_k_m",
    vision_precision: str | Sequence[str] = "int8",
    verify: bool = True,
    name: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    image_fit: Fit | None = None,
    calibration: str | os.PathLike[str] | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Converts a checkpoint into a bundle in the folder `out` and returns it.

    `source` is a checkpoint folder or a model on the hub (`org/name[@revision]`); `quant` is one
    of QUANTS, `vision_precision` one of VISION_PRECISIONS, or several, the main one first. With
    `verify` the bundle is compared with the source, run by transformers in float32, where
    transformers is installed. `vision_tower` is a folder or hub id to take the vision tower from,
    for checkpoints that leave it out; `template` and `image_fit` choose another prompt template and
    fit of pictures than the checkpoint's, where its family has several. `calibration` is a folder
    of pictures like those that the model will see: precisions that measure what flows through the
    model then look at them, too. `parts` are the files of a model that is assembled from several,
    by part, where the source's folder is not enough, and `settings` what its files leave open or
    get wrong, such as {"stage": "4"}; a wrong name raises SourceError with those that there are.
    `progress` is called with every step of a long stage.

    Raises SourceError for a checkpoint that is incomplete or unknown, ParityError when the bundle
    does not answer like its source, ExportError or BundleError when there is no room, EngineMissing
    without the packages of edgevlm[export]. Whatever happens, `out` is whole or untouched.
    """
    from edgevlm.export import pipeline

    options = pipeline.Options(
        quant,
        vision_precision,
        verify,
        name,
        vision_tower,
        template,
        image_fit,
        calibration,
        parts or {},
        settings or {},
    )
    return pipeline.run(source, Path(out), options, progress)


def inspect_source(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    image_fit: Fit | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Inspection:
    """Reads and checks a source as `export_bundle` does, whose words these are; writes nothing.

    No weight is read, only names, shapes and configs. Raises SourceError.
    """
    from edgevlm.export import pipeline

    options = pipeline.Options(
        quant="f32",
        vision_precision="fp32",
        verify=False,
        name=name,
        vision_tower=vision_tower,
        template=template,
        fit=image_fit,
        parts=parts or {},
        settings=settings or {},
    )
    job = pipeline.prepare(source, options, None)
    model = job.model
    return Inspection(
        job.name,
        job.family.name,
        model.image,
        model.prompt,
        model.decoder,
        job.placed.pieces,
        model.notes,
    )
