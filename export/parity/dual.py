"""A dual encoder's bundle against its source: tokens, pixels, rows of pictures and of texts."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import EdgeVLMError, ExportError, ParityError
from edgevlm.export.components import elements, vision_file
from edgevlm.export.dual import TEXT, DualJob
from edgevlm.export.onnx import storage
from edgevlm.export.options import WriteOptions
from edgevlm.export.parity import compare, corpus, images
from edgevlm.export.parity.metrics import distance
from edgevlm.image import RGB, preprocess
from edgevlm.manifest import StageParity
from edgevlm.progress import Stage
from edgevlm.texts import TextTokens

Array = NDArray[Any]

_PIXELS = 1e-5
# Relative, of two numbers that were read from one tensor.
_SCORE = 1e-6
_SPARE_BYTES = 1 << 30


class DualSource(Protocol):
    """A source model, run in float32 by code that is not edgevlm's."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as the tower is given them, without padding where it sees none."""

    def pixels(self, picture: RGB) -> Array:
        """A picture's pixels, float32 [3, size, size]."""

    def pictures(self, pixels: Array) -> Array:
        """Unit rows of pixels."""

    def texts(self, ids: Sequence[Sequence[int]]) -> Array:
        """Unit rows of texts."""

    def score(self, cosine: float) -> float:
        """A cosine as a score, before it is a probability."""


def verify(job: DualJob, options: WriteOptions, folder: Path) -> tuple[StageParity, ...]:
    """Compares the bundle in `folder` with its source; raises ParityError at the first stage
    that is off by more than its tolerance.
    """
    compare.check_room(sum(map(elements, job.parts.values())) * 4 + _SPARE_BYTES)
    stage = Stage(job.report, "verify", 3, "steps")
    try:
        module = importlib.import_module(f"edgevlm.export.parity.references.{job.family.name}")
        source: DualSource = module.Reference(job.checkpoint.folder, job.texts.spec)
        stages = [_tokens(job, folder, source), _scores(job, source)]
        stage.advance(1)
        stages += _pictures(job, options, folder, source)
        stage.advance(1)
        stages.append(_texts(job, options, folder, source))
    except EdgeVLMError:
        raise
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ExportError(
            f"{job.checkpoint.folder}: transformers cannot run the source ({reason}); "
            "export without verification (--no-verify)"
        ) from e
    compare.check(stages)
    stage.advance(1)
    return tuple(stages)


def _tokens(job: DualJob, folder: Path, source: DualSource) -> StageParity:
    """Every text of the corpus; raises ParityError that names the first that differs."""
    tokens = TextTokens(folder / job.texts.name, job.texts.spec)
    texts = [*corpus.corpus(), *corpus.LABELS, *(label.upper() for label in corpus.LABELS)]
    expected = source.token_ids(texts)
    ours = [tokens([text])[0].tolist() for text in texts]
    wrong = [text for text, a, b in zip(texts, ours, expected, strict=True) if a != b]
    stage = StageParity("tokens", "texts that differ", float(len(wrong)), 0.0)
    if wrong:
        raise ParityError(stage.stage, stage.worst, stage.tolerance, f"the first is {wrong[0]!r}")
    return stage


def _scores(job: DualJob, source: DualSource) -> StageParity:
    spec = job.texts.spec
    off = [
        abs(spec.scale * cosine + spec.bias - source.score(cosine)) / max(1.0, spec.scale)
        for cosine in (-0.1, 0.0, 0.3)
    ]
    return StageParity("score", "max |d| / scale", max(off), _SCORE)


def _pictures(
    job: DualJob, options: WriteOptions, folder: Path, source: DualSource
) -> list[StageParity]:
    pictures = [*images.drawn(), images.scene()[:61, :47], images.scene()[:33]]
    ours = np.stack([preprocess(picture, job.model.image) for picture in pictures])
    theirs = np.stack([source.pixels(picture) for picture in pictures])
    if ours.shape != theirs.shape:
        raise ExportError(f"parity: pixels {ours.shape} and the source's {theirs.shape} differ")
    stages = [StageParity("pixels", "max |d|", float(np.abs(ours - theirs).max()), _PIXELS)]
    expected = source.pictures(theirs)
    for i, precision in enumerate(options.vision):
        rows = storage.run(folder / vision_file(i, precision), "pixels", ours)
        name = "vision" if i == 0 else f"vision {precision.name}"
        stages.append(StageParity(name, "1 - cosine", distance(rows, expected), precision.cosine))
    return stages


def _texts(job: DualJob, options: WriteOptions, folder: Path, source: DualSource) -> StageParity:
    tokens = TextTokens(folder / job.texts.name, job.texts.spec)
    texts = [*corpus.LABELS, *corpus.corpus()[:16]]
    # Those of one length are read together: each run opens the graph.
    ids = sorted((tokens([text]) for text in texts), key=np.size)
    batches = [np.concatenate([*same]) for _, same in itertools.groupby(ids, np.size)]
    ours = np.concatenate([storage.run(folder / TEXT, "ids", batch) for batch in batches])
    expected = source.texts([each[0].tolist() for each in ids])
    tolerance = options.vision[0].cosine
    return StageParity("text", "1 - cosine", distance(ours, expected), tolerance)
