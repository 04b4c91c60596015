"""The bundle against its source, stage by stage.

The two sides never share a process: their thread pools would fight, and this package does not
know the runtime. The bundle answers through `python -m edgevlm.runtimes.stages`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle import DECODER_TOKENIZER, INPUT, REGION_ROWS, REGIONS
from edgevlm.errors import EdgeVLMError, EngineMissing, ExportError, ParityError
from edgevlm.export import child
from edgevlm.export.checkpoint.tokenizer import side_files
from edgevlm.export.checkpoint.tokenizer.vocabulary import USER_DEFINED
from edgevlm.export.components import Job, elements
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.decoder import FILE
from edgevlm.export.options import WriteOptions
from edgevlm.export.parity import images, references
from edgevlm.export.parity.corpus import around, corpus
from edgevlm.export.parity.metrics import distance, divergence, shared
from edgevlm.export.precisions import Quant, VisionPrecision
from edgevlm.image.overlap import for_projector
from edgevlm.machine import memory
from edgevlm.manifest import StageParity
from edgevlm.progress import Stage
from edgevlm.prompt import normalized
from edgevlm.specs import ImageSpec
from edgevlm.texts import json_ids

PROMPT = "answer en what is in the picture?"
N_TOKENS = 16
# PIL resizes for both; what is left is the order of float32 operations on values in -1..1.
_PIXELS = 1e-5
_PACKAGES = ("torch", "transformers")
# Both are in float32.
_REGIONS = 1e-3
# Float32 beside the language model itself: activations, logits, the processor.
_MEMORY_BYTES = 1 << 30

Array = NDArray[Any]
Arrays = dict[str, Array]


def wanted(verify: bool | None) -> bool:
    """True if an export is compared: as asked, or else where what runs the original is installed.

    Raises EngineMissing where it is asked for and cannot be.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if verify and missing:
        raise EngineMissing(
            f"verification needs {' and '.join(_PACKAGES)} ({missing[0]} is not there)",
            'pip install "edgevlm[export]" or export without it (--no-verify)',
        )
    return not missing if verify is None else verify


def check_memory(job: Job) -> None:
    """Raises ExportError when the float32 reference does not fit into free memory."""
    check_room(sum(map(elements, job.parts.values())) * 4 + _MEMORY_BYTES)


def check_room(need: int) -> None:
    """Raises ExportError when `need` bytes do not fit into free memory."""
    free = memory().free_bytes
    if free < need:
        raise ExportError(
            f"verification needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "export without it (--no-verify)"
        )


def verify(job: Job, options: WriteOptions, folder: Path) -> tuple[StageParity, ...]:
    """Compares the bundle in `folder` with its source; raises ParityError at the first stage
    that is off by more than its tolerance.
    """
    stage = Stage(job.report, "verify", 4, "steps")
    with _explained(job):
        reference = references.of(job)
    stages = [_tokens(job, folder / (INPUT if options.languages else FILE), reference)]
    stage.advance(1)
    request = references.ParityRequest(images.scene(), PROMPT, N_TOKENS)
    ours = probe(folder, request.image, request.prompt, request.n_tokens)
    stage.advance(1)
    with _explained(job):
        source = reference.run(request, ours["tokens"])
    stage.advance(1)
    stages += compare(options, ours, source)
    if job.model.region_model:
        stages.append(_regions(job, folder, reference))
    stages += _alternatives(options, folder, (ours["pixels"], job.model.image), source)
    check(stages)
    stage.advance(1)
    return tuple(stages)


@contextmanager
def _explained(job: Job) -> Iterator[None]:
    """Turns what transformers raises into one line; it has no errors of its own to name."""
    try:
        yield
    except EdgeVLMError:
        raise
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ExportError(
            f"{job.checkpoint.folder}: transformers cannot run the source ({reason}); "
            "export without verification (--no-verify)"
        ) from e


def check(stages: Iterable[StageParity]) -> None:
    """Raises ParityError at the first stage that is off by more than its tolerance."""
    for s in stages:
        if not s.ok:
            raise ParityError(s.stage, s.worst, s.tolerance)


def _tokens(job: Job, gguf: Path, reference: references.SourceModel) -> StageParity:
    """Every text of the corpus, and those made of the checkpoint's own tokens; raises ParityError
    that names the first text that differs.
    """
    typed = [t.text for t in job.vocabulary.tokens if t.type == USER_DEFINED]
    special = around(sorted(side_files.control_texts(job.checkpoint.tokenizer)))
    texts = [*corpus(), *around(typed), *special]
    with _explained(job):
        expected = reference.token_ids(texts[: -len(special)])
        # What is special to transformers no text of a user's can become here.
        expected += reference.token_ids(special, plain=True)
    given = [normalized(job.model.prefixed(text), job.model.prompt) for text in texts]
    own = gguf.with_name(DECODER_TOKENIZER)
    ours = [*map(json_ids(own), given)] if own.exists() else tools.tokenize(gguf, given)
    wrong = [text for text, a, b in zip(texts, ours, expected, strict=True) if a != b]
    stage = StageParity("tokens", "texts that differ", float(len(wrong)), 0.0)
    if wrong:
        raise ParityError(stage.stage, stage.worst, stage.tolerance, f"the first is {wrong[0]!r}")
    return stage


def _regions(job: Job, folder: Path, reference: references.SourceModel) -> StageParity:
    """The region model's two graphs, on rows and places that are drawn at random."""
    from edgevlm.export.onnx import storage

    assert isinstance(reference, references.RegionSource)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4, job.model.decoder.n_embd), np.float32)
    places = rng.random((4, 3), np.float32)
    with _explained(job):
        theirs = reference.bins(hidden), reference.rows(places)
    ours = (
        storage.run(folder / REGIONS, "hidden", hidden),
        storage.run(folder / REGION_ROWS, "places", places),
    )
    off = [np.abs(a - b).max() / b.std() for a, b in zip(ours, theirs, strict=True)]
    return StageParity("regions", "max |d| / std", float(max(off)), _REGIONS)


def compare(options: WriteOptions, ours: Arrays, source: Arrays) -> list[StageParity]:
    """Every stage of one answer; `source` was fed the tokens that the bundle chose."""
    stages = [
        StageParity("prompt", "ids that differ", _ids(ours, source), 0.0),
        StageParity("pixels", "max |d|", _max(ours, source, "pixels"), _PIXELS),
        *answered(options.quant, options.vision[0], ours, source),
    ]
    if options.quant.direct and options.vision[0].name == "fp32":
        stages.append(_greedy(options.quant, ours, source))
    return stages


def answered(
    quant: Quant, vision: VisionPrecision, ours: Arrays, source: Arrays
) -> list[StageParity]:
    """The stages that precisions change: features, embeddings and logits of one answer."""
    a, b = shared(ours["logits"], source["logits"])
    error = np.abs(a - b).max(axis=1) / float(b.std())
    # Errors of the two parts are independent at best and add up at worst.
    bound, kl = (quant.bounds.logit + vision.bounds.logit, quant.bounds.kl + vision.bounds.kl)
    return [
        *encoded(ours, source, vision.cosine),
        StageParity("prefill", "max |d| / std", float(error[0]), bound),
        StageParity("answer", "max |d| / std", float(error.max()), bound),
        StageParity("divergence", "mean KL, nats", divergence(a, b), kl),
    ]


def _greedy(quant: Quant, ours: Arrays, source: Arrays) -> StageParity:
    tokens = ours["tokens"][:, None].astype(np.int64)
    chosen = np.take_along_axis(source["logits"][:-1], tokens, axis=1)[:, 0]
    logits = shared(ours["logits"], source["logits"])[1]
    regret = float((logits[:-1].max(axis=1) - chosen).max()) / float(logits.std())
    # Two logits nearer than twice the bound may change places.
    return StageParity("greedy", "logit lost / std", regret, 2 * quant.bounds.logit)


def encoded(ours: Arrays, source: Arrays, cosine: float, of: str = "") -> list[StageParity]:
    """Compares the outputs of the encoder and of the projector behind it."""
    return [
        StageParity(name + of, "1 - cosine", distance(*_same_shape(ours, source, name)), cosine)
        for name in ("features", "embeddings")
    ]


def _alternatives(
    options: WriteOptions, folder: Path, given: tuple[Array, ImageSpec], source: Arrays
) -> list[StageParity]:
    """The further vision encoders, on the same picture's pixels and spec."""
    stages = []
    for v in options.vision[1:]:
        ours = rows(folder / f"vision.{v.name}.onnx", folder / "projector.onnx", *given)
        stages += encoded(ours, source, v.cosine, f" {v.name}")
    return stages


def rows(vision: Path, projector: Path, pixels: Array, image: ImageSpec) -> Arrays:
    """Runs an encoder and a projector on the scene's pixels: "features" and "embeddings"."""
    from edgevlm.export.onnx import storage

    features = storage.run(vision, "pixels", pixels)
    height, width = images.scene().shape[:2]
    size = (width, height)
    return {
        "features": features,
        "embeddings": storage.run(projector, "features", for_projector(features, size, image)),
    }


def _ids(ours: Arrays, source: Arrays) -> float:
    a, b = ours["prompt_ids"], source["prompt_ids"]
    return float((a != b).sum()) if a.shape == b.shape else float(max(a.size, b.size))


def _same_shape(ours: Arrays, source: Arrays, name: str) -> tuple[Array, Array]:
    a, b = ours[name], source[name]
    if a.shape != b.shape:
        raise ExportError(
            f"parity: {name} has shape {list(a.shape)} and the source's {list(b.shape)}; "
            "report the checkpoint"
        )
    return a, b


def _max(ours: Arrays, source: Arrays, name: str) -> float:
    a, b = _same_shape(ours, source, name)
    return float(np.abs(a.astype(np.float64) - b).max())


def probe(
    folder: Path,
    image: NDArray[np.uint8],
    prompt: str,
    n_tokens: int,
    tokens: Array | None = None,
) -> Arrays:
    """Runs the bundle on a picture and a prompt in a child process; returns all stages.

    The answer is its own, or `tokens` where another's is to be read.
    """
    given = {"image": image, "prompt": np.array(prompt), "n_tokens": np.array(n_tokens)}
    if tokens is not None:
        given["tokens"] = tokens
    return child.arrays("edgevlm.runtimes.stages", folder, given, "parity: the bundle")
