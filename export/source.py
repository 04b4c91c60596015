"""A source checkpoint on disk: its JSON files and its tensors, read one at a time.

Knows files, safetensors and their defects. Does not know which tensor means what.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import SourceError
from edgevlm.family import Config

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")

# safetensors' names of the types that a checkpoint may have, as numpy reads them; bfloat16 is
# unknown to numpy and read as its 16 bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
# The exponent's bits, all set in NaN and infinity alone.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
# No header of a real checkpoint comes near; a larger one is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 64 << 20
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|msgpack|h5|npz)")

Raw = NDArray[Any]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a safetensors file; `dtype` is safetensors' name, `offset` in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def raw(self) -> Raw:
        """The values as stored, in `shape`; bfloat16 as uint16. Raises SourceError."""
        return self._read(0, self.elements).reshape(self.shape)

    def float32(self) -> NDArray[np.float32]:
        """The values in `shape`, exactly as stored."""
        return to_float32(self.raw(), self.dtype)

    def blocks(self) -> Iterator[Raw]:
        """The flat values as stored, in blocks of bounded size."""
        count = _BLOCK_BYTES // DTYPES[self.dtype].itemsize
        for start in range(0, self.elements, count):
            yield self._read(start, min(count, self.elements - start))

    def _read(self, start: int, count: int) -> Raw:
        # Plain reads: pages of a memory map would count as memory of this process.
        dtype = DTYPES[self.dtype]
        offset = self.offset + start * dtype.itemsize
        try:
            values: Raw = np.fromfile(self.file, dtype=dtype, count=count, offset=offset)
        except OSError as e:
            raise SourceError(f"{self.file}: cannot be read ({e.strerror})") from None
        if values.size != count:
            raise SourceError(f"{self.file}: changed while it was read; start again")
        if not _finite(values, self.dtype):
            raise SourceError(
                f"{self.file}: {self.name} holds NaN or infinity; the checkpoint is damaged, "
                "download it again"
            )
        return values


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: parsed JSON files by name, tensors by source name, weight files."""

    folder: Path
    configs: Mapping[str, Config]
    tensors: Mapping[str, SourceTensor]
    weights: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the export reads."""
        named = sorted(self.folder / name for name in self.configs)
        tokenizers = [self.folder / n for n in TOKENIZERS if (self.folder / n).is_file()]
        return (*named, *tokenizers, *self.weights)


def to_float32(raw: Raw, dtype: str) -> NDArray[np.float32]:
    """Stored values -> float32, exactly; `dtype` is safetensors' name."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def _finite(values: Raw, dtype: str) -> bool:
    mask = _EXPONENT[dtype]
    bits = values.view(f"<u{values.itemsize}")
    step = _BLOCK_BYTES // bits.itemsize
    blocks = (bits[i : i + step] for i in range(0, bits.size, step))
    return not any(((b & bits.dtype.type(mask)) == mask).any() for b in blocks)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's JSON files and the headers of its weights; raises SourceError."""
    if not (folder / CONFIG).is_file():
        raise SourceError(
            f"{folder}: has no {CONFIG}; name the folder of a checkpoint as published on the hub"
        )
    configs = {p.name: read_json(p) for p in sorted(folder.glob("*config.json"))}
    _refuse_quantized(folder, configs[CONFIG])
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise SourceError(
            f"{folder}: has no {' or '.join(TOKENIZERS)}; copy it from the model's page"
        )
    weight_map = _weight_map(folder)
    tensors: dict[str, SourceTensor] = {}
    for name in sorted(set(weight_map.values())) if weight_map else [WEIGHTS]:
        for tensor in read_header(folder / name):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise SourceError(f"{folder / name}: {tensor.name} is also in {other}; remove one")
            tensors[tensor.name] = tensor
    _check_index(folder, weight_map, tensors)
    weights = tuple(sorted({t.file for t in tensors.values()}))
    return Checkpoint(folder, configs, tensors, weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises SourceError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: cannot be read as JSON ({e}); download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: must hold a JSON object; download it again")
    return data


def stated_license(folder: Path) -> str | None:
    """The licence that the model card (README.md) states in its front matter, or None."""
    try:
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _refuse_quantized(folder: Path, config: Config) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise SourceError(
            f"{folder / CONFIG}: the checkpoint is quantized ({method}); "
            "export the original float checkpoint, edgevlm quantizes it itself"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint; empty for a single file."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / WEIGHTS).is_file():
            raise SourceError(_no_weights(folder))
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no 'weight_map'; download it again")
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not (folder / file).is_file():
            raise SourceError(f"{folder / file}: is missing, {INDEX} names it; download it")
    return weight_map


def _no_weights(folder: Path) -> str:
    if (folder / (WEIGHTS + ".part")).exists() or list(folder.glob("model-*-of-*.safetensors")):
        return f"{folder}: has weights but no {INDEX}; download it"
    pickles = sorted(p.name for p in folder.iterdir() if _PICKLES.fullmatch(p.name))
    if pickles:
        return (
            f"{folder / pickles[0]}: only safetensors are read; "
            "save the model again with save_pretrained(safe_serialization=True)"
        )
    return f"{folder}: has no {WEIGHTS} and no {INDEX}; download the weights"


def _check_index(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise SourceError(f"{folder / file}: lacks {name}, which {INDEX} promises; download it")
    if weight_map:
        for name, tensor in tensors.items():
            if name not in weight_map:
                raise SourceError(f"{tensor.file}: holds {name}, which {INDEX} does not know")


def read_header(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, none of their data; raises SourceError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise SourceError(f"{path}: is truncated or no safetensors file; download it again")
            header = json.loads(f.read(length))
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
    begin, end = entry["data_offsets"]
    tensor = SourceTensor(name, path, entry["dtype"], tuple(entry["shape"]), data + begin)
    dtype = DTYPES.get(tensor.dtype)
    if dtype and end - begin != tensor.elements * dtype.itemsize:
        raise ValueError(name)
    return tensor
