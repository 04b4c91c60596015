"""Tiny random adapters (LoRA) of tiny checkpoints, in the files that peft and LLaVA's code save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.export.checkpoint.source import read_tensors
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import Tensors, write_safetensors
from tests.checkpoints.vocabulary import write_json

PREFIX = "base_model.model."


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name."""
    files = [p for p in sorted(base.iterdir()) if p.suffix == ".safetensors"]
    return {t.name: t.shape for file in files for t in read_tensors(file)}


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Iterable[str],
    *,
    whole: Iterable[str] = (),
    weights: str = "safetensors",
    prefix: str = PREFIX,
    ranks: Mapping[str, int] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes adapter_config.json and adapter_model of LoRA for `modules`, and random tensors of
    their own for the names in `whole`; returns the folder.

    `weights` is "safetensors" or "bin"; `ranks` are those of modules that have another than `r`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None, **config}
    stated["target_modules"] = config.get("target_modules") or sorted(modules)
    rng, data = np.random.default_rng(seed), Tensors()
    for name in modules:
        rows, *columns = shapes[f"{name}.weight"]
        rank = (ranks or {}).get(name, stated["r"])
        up = (rows, rank, *(1 for _ in columns[1:]))
        # As large as the matrix itself: an adapter that is left out shows in every answer.
        data[f"{prefix}{name}.lora_A.weight"] = _normal(rng, (rank, *columns), columns)
        data[f"{prefix}{name}.lora_B.weight"] = _normal(rng, up, (rank,))
    data |= {prefix + name: _normal(rng, shapes[name], shapes[name][1:]) for name in whole}
    write_json(folder / "adapter_config.json", stated)
    write_state(folder / f"adapter_model.{weights}", data, dtype)
    return folder


def write_projector(folder: Path, data: Tensors, name: str = "mm_projector.bin") -> Path:
    """Writes what LLaVA's own code trained whole beside a decoder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder / name, data, "float32")
    return folder


def write_state(path: Path, data: Tensors, dtype: str) -> None:
    """Writes tensors as safetensors or, by the path's suffix, as torch saves a state dict."""
    if path.suffix == ".safetensors":
        write_safetensors(path, data, dtype)
        return
    import torch

    kind = getattr(torch, dtype)
    torch.save({name: torch.from_numpy(v.copy()).to(kind) for name, v in data.items()}, path)


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], columns: Iterable[int]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    fan = max(1, int(np.prod(list(columns))))
    return rng.normal(size=shape, scale=fan**-0.5).astype(np.float32)


def write_llava_lora(folder: Path, *, lora: bool = True, **options: Any) -> tuple[Path, Path]:
    """LLaVA as its own code saves a tuned model: (the language model alone, what was trained).

    The latter holds config.json and a projector, and with `lora` an adapter of the decoder; a whole
    model of the same options, without the adapter, lies in `folder` / "whole". `options` are those
    of write_llava.
    """
    whole = write_llava(folder / "whole", model_type="llava_llama", tower="folder", **options)
    data = {n: _values(whole, n) for n in shapes_of(whole)}
    projector = {n: v for n, v in data.items() if ".mm_projector." in n}
    base, tuned = folder / "base", folder / "tuned"
    base.mkdir()
    for path in whole.iterdir():
        if "token" in path.name or path.name == "generation_config.json":
            shutil.copy(path, base)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    write_json(base / "config.json", {"model_type": "llama", "vocab_size": config["vocab_size"]})
    rest = {n: v for n, v in data.items() if n not in projector}
    write_safetensors(base / "model.safetensors", rest, "float32")
    tuned.mkdir()
    write_json(tuned / "config.json", config | {"_name_or_path": str(base)})
    if not lora:
        return base, write_projector(tuned, projector)
    names = [n.removesuffix(".weight") for n in rest if "_proj.weight" in n]
    write_adapter(tuned, shapes_of(base), names, weights="bin", base_model_name_or_path=str(base))
    trained = {PREFIX + name: value for name, value in projector.items()}
    return base, write_projector(tuned, trained, "non_lora_trainables.bin")


def _values(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    tensors = {t.name: t for file in folder.glob("*.safetensors") for t in read_tensors(file)}
    return tensors[name].float32()
