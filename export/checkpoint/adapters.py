"""Adapters (LoRA): what peft and LLaVA's own code save instead of a whole model.

Knows their files, what every setting of adapter_config.json means and which base an adapter belongs
to; what cannot be merged is refused by name. Merging is lora.py's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint import hub
from edgevlm.export.checkpoint.source import CONFIG as MODEL_CONFIG
from edgevlm.export.checkpoint.source import (
    LAYOUTS,
    Checkpoint,
    read_header,
    read_json,
    read_tensors,
)
from edgevlm.export.checkpoint.tensors import SourceTensor
from edgevlm.family import Config
from edgevlm.progress import Report

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What LLaVA's own code trains whole, beside a LoRA or alone; the first that has a tensor wins.
TRAINED = ("non_lora_trainables.bin", "mm_projector.bin")
FILES = (CONFIG, *WEIGHTS, *TRAINED)
CURE = "merge it first (peft's merge_and_unload(), then save_pretrained())"

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".lora")
# What trainers leave behind that is not a weight.
_HARMLESS = re.compile(
    r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)[\w.-]*"
)
# Settings that change nothing once an adapter is trained, or nothing of a linear map.
_INERT = (
    "auto_mapping",
    "base_model_class",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "init_lora_weights",
    "ensure_weight_tying",
)
# How a LoRA begins; the others take something out of the base when it is loaded.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: peft's config ({} where LLaVA's projector is alone) and its tensors by
    the names of the model that it was trained on. `files` are those that are read.
    """

    folder: Path
    config: Config
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]

    @property
    def model_config(self) -> Path | None:
        """The model's config.json, which LLaVA's own code puts beside what it trained."""
        path = self.folder / MODEL_CONFIG
        own = any(file.name in TRAINED for file in self.files)
        return path if own and path.is_file() else None


def find(
    folder: Path, given: str | os.PathLike[str] | None, report: Report | None
) -> tuple[Path, Adapter | None]:
    """The folder of the base and the adapter that belongs to it, of a source's folder.

    `given` is the adapter that the user names; without it the folder's own is found, and its base
    where it names one. Raises SourceError.
    """
    if given:
        try:
            place, _ = hub.locate(given, report)
        except SourceError as e:
            raise SourceError(f"{e} (the adapter, --adapter)") from None
        if (folder / CONFIG).is_file() and place.resolve() != folder.resolve():
            raise SourceError(f"{folder}: is an adapter or has one itself; only one can be merged")
        return folder, read(place)
    if not (folder / CONFIG).is_file():
        _refuse_parts(folder)
        return folder, None
    adapter = read(folder)
    named = str(adapter.config.get("base_model_name_or_path") or "")
    revision = adapter.config.get("revision")
    if not _has_weights(folder):
        return _base(folder, named, revision, report), adapter
    if named and Path(named).resolve() != folder.resolve():
        raise SourceError(
            f"{folder}: holds a whole model and an adapter of {named}; name the adapter (--adapter "
            f"{folder}) if the model is its base, or remove {CONFIG} if it is merged already"
        )
    return folder, adapter


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for names in LAYOUTS for name in names)


def _base(folder: Path, named: str, revision: Any, report: Report | None) -> Path:
    where = f"{folder}: is an adapter"
    cure = "name its base and it (edgevlm export BASE OUT --adapter FOLDER)"
    if not named:
        raise SourceError(f"{where} and names no base_model_name_or_path; {cure}")
    at = f"@{revision}" if revision and not Path(named).is_dir() else ""
    try:
        return hub.locate(named + at, report)[0]
    except SourceError as e:
        raise SourceError(f"{where} of {named}, which is not here ({e}); {cure}") from None


def _refuse_parts(folder: Path) -> None:
    """Refuses a folder that holds what was trained and not what it was trained on."""
    if _has_weights(folder):
        return
    for name in (*WEIGHTS, *TRAINED):
        if (folder / name).is_file():
            path = folder / MODEL_CONFIG
            named = read_json(path).get("_name_or_path") if path.is_file() else None
            base = f", which was {named}" if named else ""
            raise SourceError(
                f"{folder / name}: is only what was trained; name its base{base} and this folder "
                "(edgevlm export BASE OUT --adapter FOLDER)"
            )
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if below and not (folder / MODEL_CONFIG).is_file():
        raise SourceError(f"{folder}: has adapters in folders below it; name {' or '.join(below)}")


def read(folder: Path) -> Adapter:
    """The adapter in a folder, none of its data; raises SourceError."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    names = [name for name in TRAINED if (folder / name).is_file()]
    if config:
        check(config, folder / CONFIG)
        found = [name for name in WEIGHTS if (folder / name).is_file()]
        if not found:
            raise SourceError(f"{folder}: has {CONFIG} but no {' or '.join(WEIGHTS)}; download it")
        names = [found[0], *names]
    if not names:
        raise SourceError(f"{folder}: holds no adapter, no {CONFIG} and no {' or '.join(TRAINED)}")
    tensors: dict[str, SourceTensor] = {}
    for name in names:
        for tensor in read_tensors(folder / name):
            plain = tensor.name.removeprefix("base_model.model.")
            tensors.setdefault(plain, tensor)
    adapter = Adapter(folder, config, tensors, tuple(folder / name for name in names))
    more = [folder / CONFIG] if config else []
    more += [adapter.model_config] if adapter.model_config else []
    return replace(adapter, files=(*more, *adapter.files))


def projector_beside(checkpoint: Checkpoint, locate: Callable[[str], str | None]) -> Adapter | None:
    """The projector that LLaVA's own code trained alone, where the weights beside it have none."""
    inside = any((locate(name) or "").startswith("projector.") for name in checkpoint.tensors)
    alone = (checkpoint.folder / TRAINED[-1]).is_file() and not inside
    return read(checkpoint.folder) if alone else None


def left_over(folder: Path, files: Collection[Path]) -> tuple[str, ...]:
    """Notes on weights in a folder that are none of the files read; raises SourceError where they
    are an adapter of another kind.
    """
    names = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in _SUFFIXES or path in files or _HARMLESS.fullmatch(path.name):
            continue
        if path.name not in WEIGHTS and _is_adapter(path):
            raise SourceError(
                f"{path}: is an adapter in a layout that is not peft's; merge it first, or move it "
                "away"
            )
        if path.name in WEIGHTS and folder / CONFIG not in files:
            raise SourceError(f"{path}: is an adapter without its {CONFIG}; put that beside it")
        names.append(path.name)
    return (f"not read: {', '.join(names)}",) if names else ()


def _is_adapter(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return any("lora" in tensor.name.lower() for tensor in read_header(path))
    return bool(re.search("lora|adapter", path.name, re.IGNORECASE)) and path.name not in TRAINED


def check(config: Config, path: Path) -> None:
    """Refuses by name what is not a plain LoRA; raises SourceError."""
    for key, known in (
        ("peft_type", ("LORA",)),
        ("bias", (None, "none", "all", "lora_only")),
        ("init_lora_weights", _BEGINNINGS),
    ):
        if config.get(key) not in known:
            words = " or ".join(str(k) for k in known if k is not None)
            raise SourceError(
                f"{path}: {key} is {config.get(key)!r}; only {words} is known, {CURE}"
            )
    for key, value in config.items():
        if value and key not in _INERT and key not in _READ:
            raise SourceError(f"{path}: {key} is {value!r}, which is not known; {CURE}")
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise SourceError(f"{path}: {key} is {value!r}; it must be a number above 0")
