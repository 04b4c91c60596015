"""The text tower of a dual encoder's bundle at another precision, without its checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgevlm.bundle import Bundle, open_bundle, record
from edgevlm.errors import ExportError
from edgevlm.export.components import vision_file
from edgevlm.export.dual import TEXT, calibration, text_at
from edgevlm.export.onnx import quantize, storage
from edgevlm.export.options import WriteOptions
from edgevlm.export.parity import images
from edgevlm.export.parity.metrics import distance
from edgevlm.export.precisions import VisionPrecision
from edgevlm.image import preprocess
from edgevlm.manifest import Component, Manifest, StageParity
from edgevlm.specs import SelfCheck
from edgevlm.texts import TextTokens

# What the text tower can still be made of.
_WHOLE = ("fp32", "fp16")


def check_text(source: Bundle, wanted: VisionPrecision) -> None:
    """Raises ExportError where the text tower cannot have the precision."""
    stored = source.manifest.components["text"].precision
    possible = stored in _WHOLE and wanted.name != "fp32"
    if wanted.name != stored and not possible:
        raise ExportError(
            f"{source.folder}: its text tower is in {stored}, from which {wanted.name} would gain "
            "nothing or lose twice; export the checkpoint again with --vision-precision "
            f"{wanted.name}"
        )


def requantize_text(
    source: Bundle, manifest: Manifest, precision: VisionPrecision, folder: Path
) -> Manifest:
    """The manifest with the text tower of `source` at a precision, written into `folder`."""
    stored, tokenizer = source.manifest.components["text"], _tokenizer(source)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    if precision.name == stored.precision:
        storage.copy(source.path("text"), folder / TEXT)
    else:
        work = folder / "work"
        work.mkdir()
        model = storage.load(source.path("text"))
        quantize.widen(model)
        storage.save(model, work / TEXT)
        del model
        check = manifest.self_check or SelfCheck((), (), {})
        check = text_at(work / TEXT, folder, precision, _tokens(source), work, check)
        if manifest.self_check:  # a bundle that has none says nothing of its vision tower
            manifest = replace(manifest, self_check=check)
        shutil.rmtree(work)
    files = [*storage.files(folder / TEXT), folder / tokenizer.name]
    made = Component(precision.name, tuple(map(record, files)))
    return replace(manifest, components={**manifest.components, "text": made})


def compared(source: Bundle, folder: Path, options: WriteOptions) -> list[StageParity]:
    """Rows of the new bundle in `folder` against the old one's, of pictures and of texts."""
    made, parts = open_bundle(folder), source.manifest.components
    pictures = [*images.drawn(), images.scene()]
    pixels = np.stack([preprocess(picture, source.manifest.image) for picture in pictures])
    expected = storage.run(source.path("vision"), "pixels", pixels)
    stages = []
    for i, precision in enumerate(options.vision):
        rows = storage.run(folder / vision_file(i, precision), "pixels", pixels)
        name = "vision" if i == 0 else f"vision {precision.name}"
        metric = f"1 - cosine to {parts['vision'].precision}"
        stages.append(StageParity(name, metric, distance(rows, expected), precision.cosine))
    ids = calibration(_tokens(source))
    ours, theirs = (storage.run(bundle.path("text"), "ids", ids) for bundle in (made, source))
    metric, allowed = f"1 - cosine to {parts['text'].precision}", options.vision[0].cosine
    return [*stages, StageParity("text", metric, distance(ours, theirs), allowed)]


def _tokenizer(bundle: Bundle) -> Path:
    return bundle.folder / bundle.manifest.components["text"].files[-1].file


def _tokens(bundle: Bundle) -> TextTokens:
    assert bundle.manifest.text
    return TextTokens(_tokenizer(bundle), bundle.manifest.text)
