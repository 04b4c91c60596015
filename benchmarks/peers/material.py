"""Files that peers read in place of a bundle: decoder, llama.cpp's projector file, config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.benchmarks.synthetic.make import describe
from edgevlm.benchmarks.synthetic.models import MODELS, PREFIX
from edgevlm.benchmarks.synthetic.tensors import random_part
from edgevlm.bundle import Bundle
from edgevlm.errors import EdgeVLMError
from edgevlm.export.checkpoint.source import CONFIG
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.family import Config, Model

NO_CHECKPOINT = "needs the checkpoint; name it with --checkpoint"


def material(
    bundle: Bundle, checkpoint: Path | None, tower: Path | None, work: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The part of a task (see the package's docstring) that does not depend on the question, and
    why some of its keys are None.

    Synthetic models need no checkpoint: their peers get random weights of the same shapes. Raises
    ExportError for a checkpoint that cannot be read.
    """
    config, model, parts = _origin(bundle, checkpoint, tower)
    missing = dict.fromkeys(("config", "checkpoint", "mmproj"), NO_CHECKPOINT)
    mmproj = None
    if model:
        mmproj, missing["mmproj"] = _mmproj(model, parts, work)
    task = {
        "name": bundle.manifest.name,
        "family": bundle.manifest.family,
        "bundle": str(bundle.folder.absolute()),
        "decoder": str(bundle.path("decoder").absolute()),
        "mmproj": mmproj,
        "config": config,
        "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        "work": str(work),
    }
    return task, missing


def _origin(
    bundle: Bundle, checkpoint: Path | None, tower: Path | None
) -> tuple[Config | None, Model | None, Mapping[str, Weights]]:
    if checkpoint:
        from edgevlm.export import ReadOptions, pipeline

        job = pipeline.read(checkpoint, ReadOptions(vision_tower=tower))
        return job.checkpoint.configs[CONFIG], job.model, job.parts
    name = bundle.manifest.name.removeprefix(PREFIX).rpartition("-")[0]
    if not bundle.manifest.name.startswith(PREFIX) or name not in MODELS:
        return None, None, {}
    source = MODELS[name]
    _, model = describe(source, name)
    parts = {"vision": random_part(model.vision), "projector": random_part(model.projector)}
    return source.files[CONFIG], model, parts


def _mmproj(model: Model, parts: Mapping[str, Weights], work: Path) -> tuple[str | None, str]:
    from edgevlm.benchmarks.peers.mmproj import write_mmproj

    path = work / "mmproj.gguf"
    try:
        write_mmproj(model, parts, path)
    except EdgeVLMError as e:
        return None, str(e)
    return str(path), ""
