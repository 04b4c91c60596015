"""A bundle -> the same model at other precisions, without its checkpoint.

Only from weights that are still what the checkpoint's were, or rounded once to half: quantizing
what was quantized already would lose twice, and nobody would know how much.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgevlm.bundle import Bundle, check_path, open_bundle, record
from edgevlm.errors import ExportError
from edgevlm.export import dual_requantize, languages, precisions, self_check
from edgevlm.export.components import check_room, hashed, vision_file
from edgevlm.export.gguf import decoder, importance
from edgevlm.export.gguf.tools import Matrix
from edgevlm.export.gguf.trim import join
from edgevlm.export.languages import OWN_TOKENIZER
from edgevlm.export.options import Location, WriteOptions
from edgevlm.export.parity import compare, images
from edgevlm.export.precisions import Quant, VisionPrecision
from edgevlm.manifest import Component, FileRecord, Manifest, StageParity, write_manifest
from edgevlm.progress import Report, Stage
from edgevlm.specs import SelfCheck

# What can still be quantized, and how such a decoder may be rounded without quantizing it.
_WHOLE = {"f32": ("f16", "bf16"), "f16": (), "bf16": ()}
# Components that stay as they are.
_KEPT = ("projector", "masks", "regions")
_WHOLE_VISION = ("fp32", "fp16")
# Begins the names of the input bundle's files among the manifest's sources.
_INPUT = "bundle/"
# Stages that no precision changes: tokenizer, template, score and preprocessing are taken over.
_UNTOUCHED = ("tokens", "prompt", "score", "pixels", "regions")


@dataclass(frozen=True)
class Requantization:
    """Checked options for a bundle, whether they change its decoder, and the vision encoder that
    new ones are made from.
    """

    source: Bundle
    options: WriteOptions
    requantized: bool
    whole: str | None


def run(plan: Requantization, out: Path, folder: Path, report: Report | None) -> Bundle:
    """Writes the bundle `out`, whose temporary folder is `folder`; see `requantize_bundle`."""
    if out.resolve() == plan.source.folder.resolve():
        raise ExportError(f"{out}: is the bundle itself; choose another folder")
    # Nothing that is written is larger than what it is made from, the float32 graph in between
    # at most twice.
    check_room(out, folder, 3 * plan.source.bytes)
    manifest = _vision_at(plan, folder, report)
    if manifest.text:
        manifest = dual_requantize.requantize_text(
            plan.source, manifest, plan.options.vision[0], folder
        )
    elif plan.requantized:
        source = Bundle(plan.source.folder, manifest)
        manifest = quantized(source, folder, plan.options, report)
    else:
        _copy(plan.source, manifest.components["decoder"], folder)
    if plan.options.languages:
        manifest = languages.trimmed(manifest, folder, plan.options.languages, report)
    manifest = replace(manifest, source=_sources(plan), parity=_untouched(plan.source))
    write_manifest(folder, manifest)
    if plan.options.verify:
        measured = _compare(plan, folder)
        compare.check(measured)
        manifest = replace(manifest, parity=(*manifest.parity, *measured))
        write_manifest(folder, manifest)
    return Bundle(out, manifest)


def plan(
    folder: Path,
    quant: str | None,
    vision: str | Sequence[str],
    *,
    imatrix: bool | None,
    calibration: Location | None,
    verify: bool,
    languages: str | Sequence[str] = (),
) -> Requantization:
    """Checks all that can be before a byte is written; raises BundleError, ExportError."""
    check_path(folder.absolute())
    source = open_bundle(folder, "full")
    if source.manifest.text:
        for option, given in (
            ("--quant", quant),
            ("--imatrix", imatrix),
            ("--languages", languages),
        ):
            if given:
                raise ExportError(
                    f"{source.folder}: has no decoder, which {option} is for; leave it out"
                )
        if not vision:
            raise ExportError("nothing is to be changed; name --vision-precision")
    elif quant is None and not vision and not languages:
        raise ExportError(
            "nothing is to be changed; name --quant, --vision-precision or --languages"
        )
    part = source.manifest.components.get("decoder")
    stored = part.precision if part else "f32"  # of nothing
    requantized = quant not in (None, stored)
    options = WriteOptions.checked(
        quant or stored,
        vision or source.vision_precisions,
        imatrix=imatrix if requantized else None,
        calibration=calibration,
        verify=verify,
        languages=languages,
    )
    if source.manifest.text:
        dual_requantize.check_text(source, options.vision[0])
    trimmed = source.manifest.decoder.languages
    if trimmed and options.languages:
        raise ExportError(
            f"{source.folder}: is trimmed to {', '.join(trimmed)} already; name the bundle or the "
            "checkpoint that it was made from"
        )
    if options.languages and source.tokenizer:
        raise ExportError(OWN_TOKENIZER.format(source.folder))
    images.check_folder(options.calibration)
    if requantized:
        _check_decoder(source, options.quant)
    return Requantization(source, options, requantized, _whole_vision(source, options.vision))


def _check_decoder(source: Bundle, wanted: Quant) -> None:
    stored = source.manifest.components["decoder"].precision
    if stored not in _WHOLE or (wanted.direct and wanted.name not in _WHOLE[stored]):
        raise _refused(source, "decoder", stored, wanted.name, "--quant")


def _whole_vision(source: Bundle, wanted: Iterable[VisionPrecision]) -> str | None:
    there = source.vision_precisions
    whole = next((name for name in _WHOLE_VISION if name in there), None)
    for v in wanted:
        if v.name not in there and (whole is None or v.name == "fp32"):
            raise _refused(source, "encoder", ", ".join(there), v.name, "--vision-precision")
    return whole


def _refused(source: Bundle, part: str, stored: str, wanted: str, option: str) -> ExportError:
    return ExportError(
        f"{source.folder}: its {part} is in {stored}, from which {wanted} would gain nothing or "
        f"lose twice; export the checkpoint again with {option} {wanted}"
    )


def _vision_at(plan: Requantization, folder: Path, report: Report | None) -> Manifest:
    """The manifest with the vision encoders of the plan, written into `folder`."""
    from edgevlm.export.onnx import storage

    source, manifest = plan.source, plan.source.manifest
    stage = Stage(report, "vision", len(plan.options.vision), "precisions")
    new = []
    for i, precision in enumerate(plan.options.vision):
        target = folder / vision_file(i, precision)
        if precision.name in source.vision_precisions:
            storage.copy(source.vision(precision.name), target)
            stage.advance(1)
        else:
            new.append((precision, target))
    check = _convert(plan, folder, new, stage)
    made = {
        precision.name: storage.files(folder / vision_file(i, precision))
        for i, precision in enumerate(plan.options.vision)
    }
    for role in {*_KEPT} & {*manifest.components}:
        _copy(source, manifest.components[role], folder)
    written = hashed({}, made, report)
    return replace(
        manifest,
        components={**manifest.components, **written.components},
        alternatives=written.alternatives,
        self_check=check,
    )


def _convert(
    plan: Requantization, folder: Path, new: Sequence[tuple[VisionPrecision, Path]], stage: Stage
) -> SelfCheck | None:
    """Makes encoders from the one that is whole; returns what machines check themselves with."""
    from edgevlm.export.onnx import quantize, storage

    check, image = plan.source.manifest.self_check, plan.source.manifest.image
    if not new:
        return check
    assert plan.whole
    work = folder / "work"
    work.mkdir()
    model = storage.load(plan.source.vision(plan.whole))
    if plan.whole == "fp16":
        quantize.widen(model)
    storage.save(model, work / "vision.onnx")
    del model
    pixels = images.calibration(image, plan.options.calibration)
    for precision, target in new:
        quantize.convert(work / "vision.onnx", target, precision, pixels)
        stage.advance(1)
    manifest = plan.source.manifest
    projector = plan.source.path("projector") if "projector" in manifest.components else None
    known = check.tolerances if check else {}
    if check is None:
        # A bundle of an older format: all of its encoders are measured.
        check = self_check.numbers(work / "vision.onnx", projector, image)
        new = [(v, folder / vision_file(i, v)) for i, v in enumerate(plan.options.vision)]
    check = self_check.with_tolerances(check, new, projector, image, known)
    shutil.rmtree(work)
    return check


def quantized(
    source: Bundle, folder: Path, options: WriteOptions, report: Report | None
) -> Manifest:
    """The manifest of `source`, an unquantized bundle, with its decoder at the precision of the
    options, with an importance matrix where they say so.
    """
    matrix = None
    if options.imatrix:
        stage = Stage(report, "importance", 1, "steps")
        matrix = importance.collect(source.folder, source.manifest, options.calibration)
        stage.advance(1)
    return decoder_at(source, folder, options.quant, matrix, report)


def decoder_at(
    source: Bundle, folder: Path, quant: Quant, matrix: Matrix | None, report: Report | None
) -> Manifest:
    """The manifest of `source`, an unquantized bundle, with its decoder at a precision; the file is
    written into `folder`, which may be the bundle's own.
    """
    whole, kept = source.path("decoder"), None
    if source.manifest.decoder.n_output:
        whole = folder / "whole.gguf"
        kept = join(source.path("decoder"), source.input, whole, report)
    made, target = folder / "quantized.gguf", folder / decoder.FILE
    decoder.quantize(whole, made, quant, report, matrix)
    made.replace(target)
    part = Component(quant.name, (record(target), *_tokenizer(source, folder)))
    manifest = replace(
        source.manifest,
        components={**source.manifest.components, "decoder": part},
        token_embedding=decoder.embedding_location(target),
    )
    if kept is None:
        return manifest
    whole.unlink()
    return languages.cut(manifest, folder, kept, report)


def _tokenizer(source: Bundle, folder: Path) -> list[FileRecord]:
    """The record of the tokenizer that lies beside a decoder, copied into the folder."""
    if source.tokenizer is None:
        return []
    if source.tokenizer.parent != folder:
        shutil.copyfile(source.tokenizer, folder / source.tokenizer.name)
    return [record(folder / source.tokenizer.name)]


def _copy(source: Bundle, component: Component, folder: Path) -> None:
    for entry in component.files:
        shutil.copyfile(source.folder / entry.file, folder / entry.file)


def _sources(plan: Requantization) -> tuple[FileRecord, ...]:
    """The checkpoint's files, and the bundle's that went through this."""
    manifest = plan.source.manifest
    kept = [manifest.components.get(role) for role in _KEPT]
    used = [c for c in manifest.all_components if c not in kept]
    files = [replace(entry, file=_INPUT + entry.file) for c in used for entry in c.files]
    return (*manifest.source, *files)


def _untouched(source: Bundle) -> tuple[StageParity, ...]:
    return tuple(s for s in source.manifest.parity if s.stage in _UNTOUCHED)


def _compare(plan: Requantization, folder: Path) -> list[StageParity]:
    """One answer of the new bundle against the old one's, stage by stage; each metric says so."""
    source = plan.source
    if source.manifest.text:
        return dual_requantize.compared(source, folder, plan.options)
    made = open_bundle(folder)
    asked = (images.scene(), compare.PROMPT, compare.N_TOKENS)
    ours = compare.probe(folder, *asked)
    theirs = compare.probe(source.folder, *asked, ours["tokens"])
    quant = precisions.quant(made.manifest.components["decoder"].precision)
    stages = compare.answered(quant, plan.options.vision[0], ours, theirs)
    for v in plan.options.vision[1:]:
        rows = compare.rows(
            made.vision(v.name), made.path("projector"), ours["pixels"], made.manifest.image
        )
        stages += compare.encoded(rows, theirs, v.cosine, f" {v.name}")
    parts = source.manifest.components
    against = f"to {parts['vision'].precision} + {parts['decoder'].precision}"
    return [replace(s, metric=f"{s.metric} {against}") for s in stages]
