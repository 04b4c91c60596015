"""Tensors in files that torch.save wrote (pytorch_model.bin, .pth): where each one lies.

torch reads the pickle alone, restricted to plain values and tensors, and makes no tensor of it:
the values are read from the file later, as those of safetensors are. Nothing in a file is executed.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

from edgevlm.errors import EngineMissing, SourceError
from edgevlm.export.checkpoint.tensors import SourceTensor

try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError as e:
    raise EngineMissing(
        f"weights in torch's format need torch ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How torch's files began before 1.6: a pickle of its magic number.
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ZIP = b"PK\x03\x04"
_ZIP_HEADER_BYTES = 30


def read_pickle(path: Path, key: str | None = None) -> list[SourceTensor]:
    """The tensors of a state dict that torch.save wrote, none of their data; raises SourceError.

    `key` names the state dict where the file holds it as one of several entries ({"model": …}).
    What is not a tensor in a state dict is left out.
    """
    records = _records(path)
    return _tensors(path, _load(path), key, records)


def read_saved(path: Path) -> tuple[list[SourceTensor], dict[str, Any]]:
    """The tensors of a file and what it says beside them, {} where it says nothing.

    A training run saves {"model": …, "optimizer": …, "config": …}, of which the model's tensors are
    read and the config is plain values; a file without "model" is a state dict itself.
    """
    records = _records(path)
    whole = _load(path)
    nested = isinstance(whole, dict) and isinstance(whole.get("model"), dict)
    config = whole.get("config") if nested else None
    tensors = _tensors(path, whole, "model" if nested else None, records)
    return tensors, config if isinstance(config, dict) else {}


def _tensors(
    path: Path, state: Any, key: str | None, records: dict[int, int]
) -> list[SourceTensor]:
    if key is not None:
        state = state.get(key) if isinstance(state, dict) else None
    where = f"{path}: " if key is None else f"{path}: its entry {key!r} "
    if not isinstance(state, dict):
        raise SourceError(
            f"{where}is not a state dict; save the model's state_dict() with torch.save"
        )
    named = {n: v for n, v in state.items() if isinstance(n, str) and isinstance(v, torch.Tensor)}
    if not named:
        raise SourceError(f"{where}holds no tensors but {_outline(state)}; name the weights' file")
    return [_tensor(path, name, value, records) for name, value in named.items()]


def _records(path: Path) -> dict[int, int]:
    """Offset -> size in bytes of everything stored in a torch file; raises SourceError."""
    try:
        with path.open("rb") as f:
            _check_start(path, f.read(len(_LEGACY)))
            with zipfile.ZipFile(f) as archive:
                entries = archive.infolist()
            return dict(_record(path, f, entry) for entry in entries)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read ({e.strerror})") from None
    # zipfile's own words for what a damaged directory can claim; the third is an unknown version.
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError):
        raise SourceError(f"{path}: is truncated or damaged; download it again") from None


def _check_start(path: Path, start: bytes) -> None:
    if start == _LEGACY:
        raise SourceError(
            f"{path}: is in the format of torch before 1.6; load it and torch.save it again"
        )
    if not start.startswith(_ZIP):
        raise SourceError(f"{path}: not a torch.save file; download it again")


def _record(path: Path, file: IO[bytes], entry: zipfile.ZipInfo) -> tuple[int, int]:
    file.seek(entry.header_offset)
    header = file.read(_ZIP_HEADER_BYTES)
    # The name and a field for alignment lie between the header and the data.
    begin = entry.header_offset + _ZIP_HEADER_BYTES + sum(struct.unpack("<HH", header[-4:]))
    if entry.compress_type != zipfile.ZIP_STORED:
        raise SourceError(f"{path}: is a compressed archive; load it and torch.save it again")
    file.seek(begin)
    if entry.filename.endswith("/byteorder") and file.read(entry.file_size) != b"little":
        raise SourceError(f"{path}: is not little-endian; save it again on another machine")
    return begin, entry.file_size


def _load(path: Path) -> Any:
    """Loads a torch file with tensors that have no data."""
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or hostile pickle raises whatever its instructions lead to.
    except Exception as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        if wanted:
            raise SourceError(
                f"{path}: wants to run {wanted[1]}, which was refused; only tensors are read, take "
                "the weights as safetensors or save the state_dict() alone"
            ) from None
        raise SourceError(
            f"{path}: torch cannot read it ({type(e).__name__}); download it again"
        ) from None


def _tensor(path: Path, name: str, value: torch.Tensor, records: dict[int, int]) -> SourceTensor:
    if value.layout != torch.strided or not value.is_contiguous() or value.is_neg():
        raise SourceError(
            f"{path}: {name} is sparse or a view of other values; save it again with .contiguous()"
        )
    # torch works out where a storage lies instead of looking it up: believe it only where the file
    # has exactly such a record.
    storage: Any = value.untyped_storage()
    if records.get(storage._checkpoint_offset) != storage.nbytes():
        raise SourceError(
            f"{path}: {name} is not where torch expects it; load the file and torch.save it again"
        )
    offset = storage._checkpoint_offset + value.storage_offset() * value.element_size()
    dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return SourceTensor(name, path, dtype, tuple(value.shape), offset)


def _outline(state: dict[Any, Any]) -> str:
    names = [str(n) for n in state]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "nothing"
