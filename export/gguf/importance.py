"""The importance matrix of a decoder: from drawn pictures and the model's own prompts.

A text's importance matrix never sees image embeddings, which are most of what a vision-language
model reads. The bundle answers in a child process, through the runtime, as every answer is made.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

import numpy as np

from edgevlm.export import child
from edgevlm.export.gguf.tools import Matrix
from edgevlm.export.parity import images
from edgevlm.manifest import Manifest
from edgevlm.prompt import task_prompt
from edgevlm.specs import PromptSpec

# Each picture is asked about twice, in other words: 14 requests about the drawn ones alone. More
# were not tried.
_ROUNDS = 2
_TOKENS = 12
_QUESTIONS = (
    "What is in the picture?",
    "How many objects are there?",
    "Describe the picture in a few words.",
    "What colour is the largest object?",
    "Where is it?",
)
_OBJECTS = ("circle", "cat", "person", "text")


def collect(folder: Path, manifest: Manifest, pictures: Path | None) -> Matrix:
    """The importance matrix of a bundle's decoder; `pictures` is a folder of more pictures.

    The decoder must be in f32, f16 or bf16. Raises ImageError, or ExportError if it cannot answer.
    """
    seen = images.all_pictures(pictures) * _ROUNDS
    prompts = list(islice(cycle(_prompts(manifest.prompt)), len(seen)))
    given = {f"image{i}": picture for i, picture in enumerate(seen)}
    given |= {"prompts": np.array(prompts), "n_tokens": np.array(_TOKENS)}
    what = "importance matrix: the model"
    return child.arrays("edgevlm.runtimes.importance", folder, given, what)


def _prompts(spec: PromptSpec) -> list[str]:
    """The model's own tasks, each with fitting words; plain questions where it has none."""
    words = {"answer": _QUESTIONS, "detect": _OBJECTS}
    # Seven pictures and a number of prompts that shares no factor with seven meet in many pairs.
    tasks = [
        task_prompt(spec, task, word) for task in spec.tasks for word in words.get(task, ("",))
    ]
    return tasks or list(_QUESTIONS)
