"""One tensor of a weight file: where its values lie and how they are read.

Knows neither the format of the file nor what the tensor means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import SourceError

# safetensors' names of the types that a checkpoint may have, as numpy reads them; bfloat16 is
# unknown to numpy and read as its 16 bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
# The exponent's bits, all set in NaN and infinity alone.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_BLOCK_BYTES = 64 << 20

Raw = NDArray[Any]


class Tensor(Protocol):
    """A tensor of a checkpoint: one that lies in a file, or one that is computed from such."""

    @property
    def name(self) -> str:
        """Its name in the file, for messages."""

    @property
    def file(self) -> Path:
        """The file that holds its values, for messages."""

    @property
    def dtype(self) -> str:
        """safetensors' name of the stored type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, in numpy's order."""

    @property
    def elements(self) -> int:
        """Number of values."""

    def raw(self) -> Raw:
        """See SourceTensor."""

    def float32(self) -> NDArray[np.float32]:
        """See SourceTensor."""

    def blocks(self) -> Iterator[Raw]:
        """See SourceTensor."""


# The tensors of a part by canonical name.
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file of any format; `dtype` is safetensors' name, `offset` in bytes.

    The values lie in one piece, in little-endian C order.
    """

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
        dtype = DTYPES[self.dtype]
        values = stored(self.file, self.offset + start * dtype.itemsize, count, dtype)
        check_finite(self, values, self.dtype)
        return values


def stored(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> Raw:
    """That many values of a type, from a byte of a file on; raises SourceError."""
    # Pages of a memory map would count as memory of this process, and numpy's fromfile turns an
    # interrupt into a SystemError.
    values: Raw = np.empty(count, dtype)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            n_bytes = file.readinto(values.data)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read ({e.strerror})") from None
    if n_bytes != values.nbytes:
        raise SourceError(f"{path}: changed while it was read; start again")
    return values


def check_finite(tensor: Tensor, values: Raw, dtype: str) -> None:
    """Refuses values of a tensor that are not numbers; `dtype` is safetensors' name."""
    if not _finite(values, dtype):
        raise SourceError(
            f"{tensor.file}: {tensor.name} holds NaN or infinity; the checkpoint is damaged, "
            "download it again"
        )


class _Writable(np.ndarray[Any, Any]):
    """An array that writes itself as any other bytes are written."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        file.write(self.data)


def writable(values: Raw) -> Raw:
    """The same values for gguf's writer, whose only way to write an array is numpy's `tofile`: that
    turns an interrupt into a TypeError.
    """
    return np.ascontiguousarray(values).view(_Writable)


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
