"""The bundle against its source, stage by stage.

The two sides never share a process: their thread pools would fight, and this package does not
know the runtime. The bundle answers through `python -m edgevlm.runtimes.probe`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle import StageParity
from edgevlm.errors import EdgeVLMError, ExportError, ParityError
from edgevlm.export import child, images, llama, references
from edgevlm.export.components import Job, elements
from edgevlm.export.corpus import corpus
from edgevlm.export.metrics import distance, divergence
from edgevlm.export.progress import Stage

PROMPT = "answer en what is in the picture?"
N_TOKENS = 16
# PIL resizes for both; what is left is the order of float32 operations on values in -1..1.
_PIXELS = 1e-5
# Float32 beside the language model itself: activations, logits, the processor.
_MEMORY_BYTES = 1 << 30

Array = NDArray[Any]
Arrays = dict[str, Array]


def available() -> bool:
    """Whether transformers, the reference, is installed."""
    return importlib.util.find_spec("transformers") is not None


def check_memory(job: Job) -> None:
    """Raises ExportError when the float32 reference does not fit into free memory."""
    import psutil

    need = sum(map(elements, job.parts.values())) * 4 + _MEMORY_BYTES
    free = psutil.virtual_memory().available
    if free < need:
        raise ExportError(
            f"verification needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "export without it (--no-verify)"
        )


def verify(job: Job, folder: Path) -> tuple[StageParity, ...]:
    """Compares the bundle in `folder` with its source; raises ParityError at the first stage
    that is off by more than its tolerance.
    """
    stage = Stage(job.report, "verify", 4, "steps")
    with _explained(job):
        reference = references.of(job)
        expected = reference.token_ids(corpus())
    texts = [job.model.prefixed(text) for text in corpus()]
    stages = [_tokens(llama.tokenize(folder / "decoder.gguf", texts), expected)]
    _raise(stages)
    stage.advance(1)
    request = references.Request(images.scene(), PROMPT, N_TOKENS)
    ours = probe(folder, request.image, request.prompt, request.n_tokens)
    stage.advance(1)
    with _explained(job):
        source = reference.run(request, ours["tokens"])
    stage.advance(1)
    stages += [*compare(job, ours, source), *_alternatives(job, folder, ours["pixels"], source)]
    _raise(stages)
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


def _raise(stages: list[StageParity]) -> None:
    for s in stages:
        if not s.ok:
            raise ParityError(s.stage, s.worst, s.tolerance)


def _tokens(ours: list[list[int]], source: list[list[int]]) -> StageParity:
    wrong = sum(a != b for a, b in zip(ours, source, strict=True))
    return StageParity("tokens", "texts that differ", float(wrong), 0.0)


def compare(job: Job, ours: Arrays, source: Arrays) -> list[StageParity]:
    """Every stage of one answer; `source` was fed the tokens that the bundle chose."""
    a, b = ours["logits"].astype(np.float64), source["logits"].astype(np.float64)
    spread = float(b.std())
    error = np.abs(a - b).max(axis=1) / spread
    # Errors of the two parts are independent at best and add up at worst.
    vision = job.vision[0]
    parts = (job.quant.bounds, vision.bounds)
    bound, kl = sum(p.logit for p in parts), sum(p.kl for p in parts)
    stages = [
        StageParity("prompt", "ids that differ", _ids(ours, source), 0.0),
        StageParity("pixels", "max |d|", _max(ours, source, "pixels"), _PIXELS),
        *_encoded(ours, source, vision.cosine),
        StageParity("prefill", "max |d| / std", float(error[0]), bound),
        StageParity("answer", "max |d| / std", float(error.max()), bound),
        StageParity("divergence", "mean KL, nats", divergence(a, b), kl),
    ]
    if job.quant.direct and vision.name == "fp32":
        chosen = np.take_along_axis(b[:-1], ours["tokens"][:, None].astype(np.int64), axis=1)[:, 0]
        regret = float((b[:-1].max(axis=1) - chosen).max()) / spread
        # Two logits nearer than twice the bound may change places.
        stages.append(StageParity("greedy", "logit lost / std", regret, 2 * bound))
    return stages


def _encoded(ours: Arrays, source: Arrays, cosine: float, of: str = "") -> list[StageParity]:
    """What the encoder and, after it, the projector make of a picture."""
    return [
        StageParity(name + of, "1 - cosine", distance(*_same_shape(ours, source, name)), cosine)
        for name in ("features", "embeddings")
    ]


def _alternatives(job: Job, folder: Path, pixels: Array, source: Arrays) -> list[StageParity]:
    """The further vision encoders, on the same picture."""
    from edgevlm.export import onnx_files

    stages = []
    for v in job.vision[1:]:
        features = onnx_files.run(folder / f"vision.{v.name}.onnx", "pixels", pixels)
        rows = onnx_files.run(folder / "projector.onnx", "features", features)
        ours = {"features": features, "embeddings": rows}
        stages += _encoded(ours, source, v.cosine, f" {v.name}")
    return stages


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


def probe(folder: Path, image: NDArray[np.uint8], prompt: str, n_tokens: int) -> Arrays:
    """What the bundle makes of a picture and a prompt, all stages, from a child process."""
    with tempfile.TemporaryDirectory() as scratch:
        given, got = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
        np.savez(given, image=image, prompt=np.array(prompt), n_tokens=np.array(n_tokens))
        command = child.command("edgevlm.runtimes.probe", folder, given, got)
        done = subprocess.run(command, capture_output=True, check=False, **child.setting())
        if done.returncode or not got.exists():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise ExportError(
                f"parity: the bundle does not answer ({(lines or ['no reason'])[-1]})"
            )
        with np.load(got) as arrays:
            return {name: arrays[name] for name in arrays.files}
