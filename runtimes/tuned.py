"""Results of `edgevlm tune`, remembered for a bundle on a machine: one JSON file for each.

The facts that the measurements hold for stand in the file, so that one from another machine, of
another bundle or made with other releases of the engines is of no account.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from edgevlm import machine, schema
from edgevlm.bundle import Bundle
from edgevlm.errors import EngineError
from edgevlm.models import cache_directory
from edgevlm.runtimes.rules import EngineSettings, Goal
from edgevlm.runtimes.vision.ort import Ort

FORMAT = 1


@dataclass(frozen=True)
class Compared:
    """One comparison of a tuning.

    part: what was timed ("vision", "prefill", "decode"). choices: value in words -> milliseconds
    of its fastest run; the first is the one that held before. chosen: the value taken.
    """

    setting: str
    part: str
    choices: dict[str, float]
    chosen: str


@dataclass(frozen=True)
class Tuning:
    """A tuning: the settings for each goal, the comparisons behind them, and what had no time.

    machine, files: what it holds for.
    """

    format: int
    machine: dict[str, str]
    files: dict[str, str]
    goals: dict[str, EngineSettings]
    compared: tuple[Compared, ...]
    skipped: tuple[str, ...]


def facts(features: Sequence[str]) -> dict[str, str]:
    """Facts that measurements depend on besides the bundle; `features` are llama.cpp's words."""
    return {
        "processor": machine.processor_name(),
        "cores": str(machine.physical_cores()),
        "features": " ".join(features),
        "llama-cpp-python": version("llama-cpp-python"),
        "onnxruntime": Ort().version,
    }


def files(bundle: Bundle) -> dict[str, str]:
    """The hashes of the bundle's files by name."""
    components = bundle.manifest.all_components
    return {record.file: record.sha256 for part in components for record in part.files}


def recall(bundle: Bundle, features: Sequence[str]) -> Tuning | None:
    """The tuning of this bundle on this machine, or None; a damaged file counts as none."""
    here, of = facts(features), files(bundle)
    try:
        data = schema.parsed(_path(here, of).read_text(encoding="utf-8"))
        found = schema.read(Tuning, data)
    except (OSError, ValueError, schema.SchemaError):
        return None
    same = (found.format, found.machine, found.files) == (FORMAT, here, of)
    return found if same else None


def chosen(bundle: Bundle, features: Sequence[str], goal: Goal) -> EngineSettings | None:
    """The settings that a tuning of this bundle on this machine chose for a goal, or None."""
    found = recall(bundle, features)
    return found.goals.get(goal) if found else None


def remember(found: Tuning) -> Path:
    """Keeps a tuning and returns its file. Raises EngineError where it cannot be written."""
    path = _path(found.machine, found.files)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(schema.plain(found), indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        with suppress(OSError):
            partial.unlink()
        raise EngineError(
            f"{path}: what was measured cannot be kept ({e.strerror or e}); EDGEVLM_HOME names "
            "another place"
        ) from None
    return path


def forget(bundle: Bundle, features: Sequence[str]) -> bool:
    """Removes the tuning of this bundle on this machine; False where there is none."""
    try:
        _path(facts(features), files(bundle)).unlink()
    except OSError:
        return False
    return True


def _path(here: Mapping[str, str], of: Mapping[str, str]) -> Path:
    text = json.dumps([here, of], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory() / "tuned" / f"{key}.json"
