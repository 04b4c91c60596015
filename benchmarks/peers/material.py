"""Files that peers read in place of a bundle: decoder, llama.cpp's projector file, config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from edgevlm.processors import PREPROCESSOR

NO_CHECKPOINT = "needs the checkpoint; name it with --checkpoint"
# Families whose config.json is of the decoder alone: others would take the model for one of texts.
_IN_PIECES = ("tinygptv",)


def material(
    bundle: Bundle, checkpoint: Path | None, tower: Path | None, work: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The part of a task (see the package's docstring) that does not depend on the question, and
    why some of its keys are None.

    Synthetic models need no checkpoint: their peers get random weights of the same shapes. Raises
    ExportError for a checkpoint that cannot be read.
    """
    origin = _origin(bundle, checkpoint, tower)
    missing = dict.fromkeys(("config", "checkpoint", "mmproj"), NO_CHECKPOINT)
    mmproj, config = None, origin.config
    if bundle.manifest.family in _IN_PIECES and config:
        missing["config"] = f"takes it for a {config['model_type']} without a picture"
        config = None
    if origin.model:
        mmproj, missing["mmproj"] = _mmproj(origin.model, origin.parts, work)
    task = {
        "name": bundle.manifest.name,
        "family": bundle.manifest.family,
        "bundle": str(bundle.folder.absolute()),
        "decoder": str(bundle.path("decoder").absolute()),
        "mmproj": mmproj,
        "config": config,
        "pictures": origin.pictures,
        "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        "work": str(work),
    }
    return task, missing


@dataclass(frozen=True)
class _Origin:
    """A bundle's model as its checkpoint has it: config.json and preprocessor_config.json, None
    where there is none, what they say, and the weights of the tower and the connector.
    """

    config: Config | None = None
    pictures: Config | None = None
    model: Model | None = None
    parts: Mapping[str, Weights] = field(default_factory=dict)


def _origin(bundle: Bundle, checkpoint: Path | None, tower: Path | None) -> _Origin:
    if checkpoint:
        from edgevlm.export import ReadOptions, pipeline

        job = pipeline.read(checkpoint, ReadOptions(vision_tower=tower))
        files = job.checkpoint.configs
        return _Origin(files[CONFIG], files.get(PREPROCESSOR), job.model, job.parts)
    name = bundle.manifest.name.removeprefix(PREFIX).rpartition("-")[0]
    if not bundle.manifest.name.startswith(PREFIX) or name not in MODELS:
        return _Origin()
    source = MODELS[name]
    _, model = describe(source, name)
    parts = {"vision": random_part(model.vision), "projector": random_part(model.projector)}
    return _Origin(source.files[CONFIG], source.files.get(PREPROCESSOR), model, parts)


def _mmproj(model: Model, parts: Mapping[str, Weights], work: Path) -> tuple[str | None, str]:
    from edgevlm.benchmarks.peers.mmproj import write_mmproj

    path = work / "mmproj.gguf"
    try:
        write_mmproj(model, parts, path)
    except EdgeVLMError as e:
        return None, str(e)
    return str(path), ""
