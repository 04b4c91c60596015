"""Exports a published checkpoint to a bundle: `export_bundle` is the door.

Importing this package loads nothing heavy. An export needs onnx; torch and transformers only to
compare the bundle with the original, and torch to read weights that torch.save wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.bundle import Bundle
from edgevlm.export import targets
from edgevlm.export.options import AS_FOUND, ReadOptions, WriteOptions
from edgevlm.export.precisions import QUANTS, VISION_PRECISIONS
from edgevlm.export.targets import TARGETS
from edgevlm.manifest import WeightFileRecord
from edgevlm.specs import DecoderSpec, Fit, ImageSpec, PromptSpec, TextSpec
from edgevlm.types import Progress

__all__ = [
    "QUANTS",
    "TARGETS",
    "VISION_PRECISIONS",
    "Inspection",
    "ReadOptions",
    "export_bundle",
    "inspect_source",
    "requantize_bundle",
]


@dataclass(frozen=True)
class Inspection:
    """A source as an export would read it; `weight_files`, `notes` and `text` are the manifest's,
    whose `prompt` and `decoder` are empty for a dual encoder.
    """

    name: str
    family: str
    image: ImageSpec
    prompt: PromptSpec
    decoder: DecoderSpec
    weight_files: tuple[WeightFileRecord, ...]
    notes: tuple[str, ...]
    text: TextSpec | None = None


def export_bundle(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str | None = None,
    quant: str | None = None,
    vision_precision: str | Sequence[str] = (),
    verify: bool | None = None,
    name: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    image_fit: Fit | None = None,
    calibration: str | os.PathLike[str] | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Mapping[str, str] | None = None,
    imatrix: bool | None = None,
    adapter: str | os.PathLike[str] | None = None,
    languages: str | Sequence[str] = (),
    segment_decoder: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Converts a checkpoint into a bundle in the folder `out` and returns it.

    `source` is a checkpoint folder or a model on the hub (`org/name[@revision]`); `quant` is one
    of QUANTS, `vision_precision` one of VISION_PRECISIONS, or several, the main one first. What of
    them is not named, `target` picks, one of TARGETS; that itself is "laptop" where not named. With
    `verify` the bundle is compared with the source, run by transformers in float32, where
    transformers is installed. `vision_tower` is a folder or hub id to take the vision tower from,
    for checkpoints that leave it out; `template` and `image_fit` choose another prompt template and
    fit of pictures than the checkpoint's, where its family has several. `calibration` is a folder
    of pictures like those that the model will see: precisions that measure what flows through the
    model then look at them, too. `parts` are the files of a model that is assembled from several,
    by part, where the source's folder is not enough, and `settings` what its files leave open or
    get wrong, such as {"stage": "4"}; a wrong name raises SourceError with those that there are.
    `imatrix` has the decoder's weights rounded by how much they matter to pictures and prompts;
    None does so where llama.cpp's type needs it. `adapter` is a folder or hub id with a LoRA as
    peft saves it, or with what LLaVA's own code trained beside its base, that is merged into the
    source; one in the source's own folder is merged unasked. `languages` are codes, "en,fr" or one
    by one: answers can then have the tokens alone that texts in these languages need, which makes
    models with large vocabularies faster (docs/languages.md). `segment_decoder` is the decoder of a
    PaliGemma's masks, big_vision's vae-oid.npz, which becomes a further component. `progress` is
    called with every step of a long stage.

    A source without a checkpoint's weights may have the decoder and llama.cpp's multimodal
    projector file as GGUF instead: of several decoders the one in `quant` is taken, and nothing is
    compared.

    >>> bundle = edgevlm.export_bundle("checkpoint", "bundle", target="laptop", verify=False)
    >>> bundle.manifest.components["decoder"].precision
    'q4_k_m'

    Raises SourceError for a checkpoint that is incomplete or unknown, ParityError when the bundle
    does not answer like its source, ExportError or BundleError when there is no room, EngineMissing
    without the packages of edgevlm[export] where `verify` or the source's format needs them, or
    of edgevlm[languages] where `languages` are named.
    Whatever happens, `out` is whole or untouched.
    """
    from edgevlm.export import pipeline

    chosen = targets.target(target or "laptop")
    read = ReadOptions(
        name=name,
        vision_tower=vision_tower,
        template=template,
        image_fit=image_fit,
        parts=parts or {},
        settings=settings or {},
        adapter=adapter,
    )
    write = WriteOptions.checked(
        quant or chosen.quant,
        vision_precision or chosen.vision,
        imatrix=imatrix,
        calibration=calibration,
        verify=verify,
        insists=quant is not None,
        languages=languages,
        segment_decoder=segment_decoder,
    )
    return pipeline.run(source, Path(out), read, write, progress)


def inspect_source(source: str | os.PathLike[str], options: ReadOptions = AS_FOUND) -> Inspection:
    """Reads and checks a source as `export_bundle` does; writes nothing.

    No weight is read, only names, shapes and configs. Raises SourceError.
    """
    from edgevlm.export import dual, pipeline
    from edgevlm.export.checkpoint import hub

    folder, name = hub.locate(source)
    if dual.found(folder):
        pair = dual.read(folder, name, options)
        empty = PromptSpec(()), DecoderSpec("", "causal", 0, 0, 0, 0)
        about, notes = pair.model.image, pair.model.notes
        return Inspection(pair.name, pair.family.name, about, *empty, (), notes, pair.texts.spec)
    read = pipeline.read(source, options)
    model = read.model
    return Inspection(
        read.name,
        read.family.name,
        model.image,
        model.prompt,
        model.decoder,
        read.tensors.weight_files,
        (*model.notes, *read.tensors.notes),
    )


def requantize_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | None = None,
    vision_precision: str | Sequence[str] = (),
    verify: bool = True,
    calibration: str | os.PathLike[str] | None = None,
    imatrix: bool | None = None,
    languages: str | Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Writes a bundle at other precisions into the folder `out`, without its checkpoint.

    What is not named stays as it is; the other words are those of `export_bundle`. Only what is
    still whole is quantized: a decoder in f32, f16 or bf16, a vision encoder in fp32 or fp16, a
    dual encoder's text tower, which gets the first precision of the vision tower. A decoder of any
    precision can be trimmed to `languages`, once. With `verify` the new bundle is compared with the
    old one; its manifest names both the checkpoint's files and the old bundle's.

    Raises BundleError, ParityError when the new bundle does not answer like the old one, and
    ExportError where precision would be lost twice, there is no room, or nothing was named.
    """
    from edgevlm.export import requantize
    from edgevlm.export.components import destination

    with destination(Path(out)) as folder:
        plan = requantize.plan(
            Path(bundle),
            quant,
            vision_precision,
            imatrix=imatrix,
            calibration=calibration,
            verify=verify,
            languages=languages,
        )
        return requantize.run(plan, Path(out), folder, progress)
