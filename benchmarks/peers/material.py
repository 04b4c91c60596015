"""What peers read instead of a bundle: the decoder, llama.cpp's projector file, the config."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.benchmarks.synthetic.make import describe
from edgevlm.benchmarks.synthetic.models import MODELS, PREFIX, Files
from edgevlm.bundle import Bundle
from edgevlm.errors import EdgeVLMError
from edgevlm.export.parts import KINDS, Part
from edgevlm.export.tensors import SourceTensor
from edgevlm.family import Model

_NO_CHECKPOINT = "needs the checkpoint; name it with --checkpoint"


def material(
    bundle: Bundle, checkpoint: Path | None, tower: Path | None, work: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The part of a task (see the package's docstring) that does not depend on the question, and
    why some of its keys are None.

    Synthetic models need no checkpoint: their peers get random weights of the same shapes. Raises
    ExportError for a checkpoint that cannot be read.
    """
    files, model, parts = _origin(bundle, checkpoint, tower)
    missing = dict.fromkeys(("config", "checkpoint", "mmproj"), _NO_CHECKPOINT)
    mmproj = None
    if model:
        mmproj, missing["mmproj"] = _mmproj(model, parts, work)
    task = {
        "name": bundle.manifest.name,
        "bundle": str(bundle.folder.absolute()),
        "decoder": str(bundle.path("decoder").absolute()),
        "mmproj": mmproj,
        "config": files.get("config.json"),
        "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        "work": str(work),
    }
    return task, missing


def _origin(
    bundle: Bundle, checkpoint: Path | None, tower: Path | None
) -> tuple[Files, Model | None, Mapping[str, Part]]:
    if checkpoint:
        from edgevlm.export import pipeline

        options = pipeline.Options("f16", "fp32", False, None, tower)
        job = pipeline.prepare(checkpoint, options, None)
        return job.checkpoint.configs, job.model, job.parts
    name = bundle.manifest.name.removeprefix(PREFIX).rpartition("-")[0]
    if not bundle.manifest.name.startswith(PREFIX) or name not in MODELS:
        return {}, None, {}
    files = MODELS[name]
    _, model = describe(files, name)
    return files, model, {"vision": _random(model.vision), "projector": _random(model.projector)}


def _mmproj(model: Model, parts: Mapping[str, Part], work: Path) -> tuple[str | None, str]:
    from edgevlm.benchmarks.peers.mmproj import write_mmproj

    path = work / "mmproj.gguf"
    try:
        write_mmproj(model, parts, path)
    except EdgeVLMError as e:
        return None, str(e)
    return str(path), ""


def _random(config: Mapping[str, Any]) -> Part:
    shapes = KINDS[config["kind"]](config)
    return {n: _RandomTensor(n, Path(), "F32", shape, 0) for n, shape in shapes.items()}


@dataclass(frozen=True)
class _RandomTensor(SourceTensor):
    """A tensor that lies in no file."""

    def float32(self) -> npt.NDArray[np.float32]:
        """Random values; ones for norms."""
        if len(self.shape) == 1 and self.name.endswith("weight"):
            return np.ones(self.shape, np.float32)
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return rng.standard_normal(self.shape, np.float32) * np.float32(0.02)
