"""onnxruntime-genai: its model builder says which models it has."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TITLE = "onnxruntime-genai"
PACKAGE = "onnxruntime-genai"
INSTALL = "pip install onnxruntime-genai torch transformers onnx-ir sentencepiece"
NEEDS = ("config",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Raises the builder's own error: no release up to 0.18 builds PaliGemma or LLaVA."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if not spec or not spec.submodule_search_locations:
        raise ImportError("No module named 'onnxruntime_genai'")
    builder = Path(spec.submodule_search_locations[0]) / "models" / "builder.py"
    source, out = Path(task["work"]) / "config", Path(task["work"]) / "genai"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text(json.dumps(task["config"]), encoding="utf-8")
    folder = task["checkpoint"] or source
    done = subprocess.run(
        [sys.executable, builder, "-i", folder, "-o", out, "-p", "int4", "-e", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise _error(done.stderr, last)(last)
    raise NotImplementedError("builds this model; this peer knows no way to ask it")


def _error(said: str, last: str) -> type[Exception]:
    """The kind of error that the builder's process ended with."""
    missing = ("ModuleNotFoundError", "ImportError", "RuntimeError: ImportError")
    if last.startswith(missing) or "need to have sentencepiece" in said:
        return ImportError
    unknown = last.startswith("NotImplementedError") or "does not recognize this arch" in said
    return NotImplementedError if unknown else RuntimeError
