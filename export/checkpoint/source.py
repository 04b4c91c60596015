"""A source checkpoint on disk: its JSON files and its tensors, read one at a time.

Knows files, safetensors and their defects; torch's own format is pickles.py's business. Does not
know which tensor means what.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm import schema
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint import json_shapes
from edgevlm.export.checkpoint.tensors import DTYPES, SourceTensor
from edgevlm.family import Config

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in one file, or the index of several; the first that is there is read.
LAYOUTS = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
# open_clip's layout, which has no config.json; the first weights that are there are read.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CARD = "README.md"
# Each is a whole tokenizer, the last with merges.txt beside it; the first that is there is read.
FAST = "tokenizer.json"
TOKENIZERS = ("tokenizer.model", FAST, "vocab.json")

# The name of a tokenizer of its own folder among the checkpoints beside one.
TOKENIZER = "tokenizer"

# No header of a real checkpoint comes near; a larger one is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS = 32  # as many as numpy has
_OTHERS = re.compile(r".*\.(bin|pt|pth|ckpt|msgpack|h5|npz)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: parsed JSON files by name, tensors by source name, weight files.

    `extra` are the checkpoints beside it, by name: a vision tower, or weight files of the model. A
    single file has no JSON files; `said` is what it holds beside its tensors. `config` is where its
    config.json lies, None for the folder.
    """

    folder: Path
    configs: Mapping[str, Config]
    tensors: Mapping[str, SourceTensor]
    weights: tuple[Path, ...]

    extra: Mapping[str, Checkpoint] = field(default_factory=dict)
    said: Config = field(default_factory=dict)
    config: Path | None = None

    @property
    def tokenizer(self) -> Checkpoint:
        """Its files of the tokenizer: its own, or those of the folder that it reads that from."""
        return self.extra.get(TOKENIZER, self)

    @property
    def config_path(self) -> Path:
        """Its config.json, for messages."""
        return self.config or self.folder / CONFIG

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of this folder that the export reads."""
        own = {CONFIG, FAST} & self.configs.keys() and TOKENIZER not in self.extra
        beside = (*TOKENIZERS, "merges.txt") if own else ()
        names = (*sorted(self.configs.keys() - {FAST}), *beside)
        return (*(p for n in names if (p := self.folder / n).is_file()), *self.weights)


def read_checkpoint(folder: Path, *, tokenizer: bool = True) -> Checkpoint:
    """Reads a checkpoint's JSON files and the headers of its weights; `tokenizer` as in
    read_configs.

    Raises SourceError, and EngineMissing where the weights are torch's and torch is not there.
    """
    configs = read_configs(folder, tokenizer=tokenizer)
    single, index = _layout(folder)
    weight_map = _weight_map(folder, index)
    tensors: dict[str, SourceTensor] = {}
    for name in sorted(set(weight_map.values())) if weight_map else [single]:
        for tensor in read_tensors(folder / name):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise SourceError(f"{folder / name}: {tensor.name} is also in {other}; remove one")
            tensors[tensor.name] = tensor
    _check_index(folder / index, weight_map, tensors)
    weights = tuple(sorted({t.file for t in tensors.values()}))
    return Checkpoint(folder, configs, tensors, weights)


def read_open_clip(folder: Path) -> Checkpoint:
    """A checkpoint in open_clip's layout; raises as read_checkpoint."""
    configs = {p.name: read_json(p) for p in sorted(folder.glob("*config.json"))}
    path = next((p for n in OPEN_CLIP_WEIGHTS if (p := folder / n).is_file()), None)
    if path is None:
        raise SourceError(
            f"{folder}: has no {' and no '.join(OPEN_CLIP_WEIGHTS)}; download the weights"
        )
    return Checkpoint(folder, configs, {t.name: t for t in read_tensors(path)}, (path,))


def read_configs(folder: Path, *, tokenizer: bool = True) -> dict[str, Config]:
    """A checkpoint's JSON files by name.

    With `tokenizer` the folder must hold one; a vision tower's has none that matters. Raises
    SourceError.
    """
    if not (folder / CONFIG).is_file():
        raise SourceError(
            f"{folder}: has no {CONFIG}; name the folder of a checkpoint as published on the hub"
        )
    configs: dict[str, Config] = {p.name: read_json(p) for p in sorted(folder.glob("*config.json"))}
    _refuse_quantized(folder, configs[CONFIG])
    if tokenizer:
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise SourceError(
                f"{folder}: has no {' or '.join(TOKENIZERS)}; copy it from the model's page"
            )
        configs |= read_present(folder, (FAST,))
    return configs


def read_settings(folder: Path, names: Collection[str]) -> Checkpoint | None:
    """JSON files of a folder and nothing else of it, None where it has none of these names."""
    found = read_present(folder, names)
    return Checkpoint(folder, found, {}, ()) if found else None


def read_present(folder: Path, names: Iterable[str]) -> dict[str, Config]:
    """The JSON files of these names that are in a folder, by name; raises SourceError."""
    return {n: read_json(folder / n) for n in names if (folder / n).is_file()}


def read_file(path: Path) -> Checkpoint:
    """A single weight file, with or without what a training run wrote beside them.

    Raises SourceError, and EngineMissing where it is torch's and torch is not there.
    """
    if path.suffix == ".safetensors":
        tensors, said = read_header(path), dict[str, Any]()
    else:
        # Importing it loads torch, which takes seconds.
        from edgevlm.export.checkpoint.pickles import read_saved

        tensors, said = read_saved(path)
    return Checkpoint(path.parent, {}, {t.name: t for t in tensors}, (path,), said=said)


def read_tensors(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file or of a state dict that torch saved, none of their data."""
    if path.suffix == ".safetensors":
        return read_header(path)
    # Importing it loads torch, which takes seconds.
    from edgevlm.export.checkpoint.pickles import read_pickle

    return read_pickle(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises SourceError."""
    try:
        data = schema.parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: cannot be read as JSON ({e}); download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: must hold a JSON object; download it again")
    try:
        json_shapes.check(path.name, data)
    except ValueError as e:
        raise SourceError(f"{path}: {e}; download it again") from None
    return data


def stated_license(folder: Path) -> str | None:
    """The licence that the model card (README.md) states in its front matter, or None."""
    return _stated(folder, r"^license: *(\S+)")


def stated_base(folder: Path) -> str | None:
    """The hub id of the one model that the model card says this one was made of, or None."""
    return _stated(folder, r"^base_model:(?: *| *\n *- *)([\w.-]+/[\w.-]+) *$(?!\n *- )")


def _stated(folder: Path, pattern: str) -> str | None:
    try:
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(pattern, front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _refuse_quantized(folder: Path, config: Config) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise SourceError(
            f"{folder / CONFIG}: the checkpoint is quantized ({method}); "
            "export the original float checkpoint, edgevlm quantizes it itself"
        )


def _layout(folder: Path) -> tuple[str, str]:
    """Names of the weight file and of the index that a folder has, either or both."""
    for names in LAYOUTS:
        if any((folder / name).is_file() for name in names):
            return names
    for single, index in LAYOUTS:
        stem, suffix = single.split(".")
        if (folder / f"{single}.part").exists() or list(folder.glob(f"{stem}-*-of-*.{suffix}")):
            raise SourceError(f"{folder}: has weights but no {index}; download it")
    others = sorted(p.name for p in folder.iterdir() if _OTHERS.fullmatch(p.name))
    if others:
        raise SourceError(
            f"{folder / others[0]}: only {' and '.join(single for single, _ in LAYOUTS)} are read; "
            "save the model again with save_pretrained()"
        )
    raise SourceError(f"{folder}: has no {WEIGHTS} and no {INDEX}; download the weights")


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint; empty for a single file."""
    path = folder / index
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no 'weight_map'; download it again")
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not (folder / file).is_file():
            raise SourceError(f"{folder / file}: is missing, {index} names it; download it")
    return weight_map


def _check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise SourceError(
                f"{index.parent / file}: lacks {name}, which {index.name} promises; download it"
            )
    if weight_map:
        for name, tensor in tensors.items():
            if name not in weight_map:
                raise SourceError(f"{tensor.file}: holds {name}, which {index.name} does not know")


def read_header(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, none of their data; raises SourceError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise SourceError(f"{path}: is truncated or no safetensors file; download it again")
            header = schema.parsed(f.read(length))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        tensors = [_entry(path, k, v, 8 + length) for k, v in entries.items()]
        end = 8 + length + max((v["data_offsets"][1] for v in entries.values()), default=0)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise SourceError(f"{path}: its header is damaged; download it again") from None
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise SourceError(f"{path}: is {what} ({size} bytes, not {end}); download it again")
    return tensors


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int) -> SourceTensor:
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    numbers = (begin, end, *shape)
    if not isinstance(entry["dtype"], str) or not all(type(n) is int for n in numbers):
        raise ValueError(name)
    if min(numbers) < 0 or end < begin or len(shape) > _MOST_DIMENSIONS or max(numbers) > 2**62:
        raise ValueError(name)
    tensor = SourceTensor(name, path, entry["dtype"], tuple(shape), data + begin)
    dtype = DTYPES.get(tensor.dtype)
    if dtype and end - begin != tensor.elements * dtype.itemsize:
        raise ValueError(name)
    return tensor
