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
from edgevlm.self_check import cosine, picture, sketch
from edgevlm.specs import ImageSpec, SelfCheck

# Kernels of another processor may round this much more than those that a precision was tried on.
_SPARE = 3
# Nothing nearer is wrong: it is what 8 bits may cost.
_LEAST = 0.01
# Beyond this nothing is right, on whichever machine.
_MOST = 0.2


def numbers(vision: Path, projector: Path, image: ImageSpec) -> SelfCheck:
    """Sketches of the features and embeddings that these graphs make of the fixed picture, without
    tolerances.
    """
    from edgevlm.export.onnx import storage

    side = checked_side(image)
    features = storage.run(vision, "pixels", picture(side))
    rows = storage.run(projector, "features", for_projector(features, (side, side), image))
    return SelfCheck(_plain(sketch(features)), _plain(sketch(rows)), {})


def with_tolerances(
    right: SelfCheck,
    encoders: Iterable[tuple[VisionPrecision, Path]],
    projector: Path,
    image: ImageSpec,
    known: Mapping[str, float] | None = None,
) -> SelfCheck:
    """The numbers with what each of these encoders may be off by, beside those that are `known`:
    what the exporter allows its precision, or three times what it is off by here.
    """
    found = dict(known or {})
    for precision, path in encoders:
        mine = numbers(path, projector, image)
        worst = min(
            cosine(mine.features, right.features), cosine(mine.embeddings, right.embeddings)
        )
        off = min(_MOST, round(_SPARE * (1 - worst), 4))
        found[precision.name] = max(_LEAST, precision.cosine, off)
    return replace(right, tolerances=found)


def _plain(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return tuple(float(f"{v:.6g}") for v in values.ravel())
