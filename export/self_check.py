"""Numbers of the float32 graphs, which a bundle keeps for machines to check themselves with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.export.precisions import VisionPrecision
from edgevlm.image.overlap import for_projector
from edgevlm.image.plan import checked_side
from edgevlm.self_check import TEXT, cosine, picture, row_sketch, sketch
from edgevlm.specs import ImageSpec, SelfCheck
from edgevlm.texts import TextTokens

# Kernels of another processor may round this much more than those that a precision was tried on.
_SPARE = 3
# Nothing nearer is wrong: it is what 8 bits may cost.
_LEAST = 0.01
# Beyond this nothing is right, on whichever machine.
_MOST = 0.2


def numbers(vision: Path, projector: Path | None, image: ImageSpec) -> SelfCheck:
    """Sketches of the features and embeddings that these graphs make of the fixed picture, without
    tolerances; without a projector of a dual encoder's row.
    """
    from edgevlm.export.onnx import storage

    side = checked_side(image)
    features = storage.run(vision, "pixels", picture(side))
    if projector is None:
        return SelfCheck(_plain(row_sketch(features)), (), {})
    rows = storage.run(projector, "features", for_projector(features, (side, side), image))
    return SelfCheck(_plain(sketch(features)), _plain(sketch(rows)), {})


def with_tolerances(
    right: SelfCheck,
    encoders: Iterable[tuple[VisionPrecision, Path]],
    projector: Path | None,
    image: ImageSpec,
    known: Mapping[str, float] | None = None,
) -> SelfCheck:
    """The numbers with what each of these encoders may be off by, beside those that are `known`:
    what the exporter allows its precision, or three times what it is off by here.
    """
    found = dict(known or {})
    for precision, path in encoders:
        mine = numbers(path, projector, image)
        worst = cosine(mine.features, right.features)
        if projector:
            worst = min(worst, cosine(mine.embeddings, right.embeddings))
        found[precision.name] = _tolerance(worst, precision)
    return replace(right, tolerances=found)


def text_numbers(tower: Path, tokens: TextTokens) -> tuple[float, ...]:
    """The sketch of the row that a text tower makes of the fixed text."""
    from edgevlm.export.onnx import storage

    return _plain(row_sketch(storage.run(tower, "ids", tokens([TEXT]))))


def with_text(
    right: SelfCheck,
    numbers: tuple[float, ...],
    tower: Path,
    precision: VisionPrecision,
    tokens: TextTokens,
) -> SelfCheck:
    """The numbers with those of the float32 text tower, and what the written one may be off by."""
    worst = cosine(text_numbers(tower, tokens), numbers)
    tolerances = {**right.tolerances, "text": _tolerance(worst, precision)}
    return replace(right, text=numbers, tolerances=tolerances)


def _tolerance(worst: float, precision: VisionPrecision) -> float:
    off = min(_MOST, round(_SPARE * (1 - worst), 4))
    return max(_LEAST, precision.cosine, off)


def _plain(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return tuple(float(f"{v:.6g}") for v in values.ravel())
