"""big_vision's decoder of PaliGemma's masks -> the bundle's mask decoder, masks.onnx.

The decoder of a VQ-VAE, as arXiv 2301.02229 has it: 16 codes of a codebook, a square of 4 x 4, grow
to 64 x 64 by transposed convolutions.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.tensors import Raw, Weights, check_finite
from edgevlm.masks import N_CODES, N_ENTRIES
from edgevlm.progress import Report, Stage

FILE = "masks.onnx"
# The square's side, the width of the codebook and that of the layers after it.
_SIDE, _WIDTH, _CHANNELS = 4, 512, 128
_CODEBOOK = "_vq_vae._embedding"
_RESIDUAL = ("decoder.2.net", "decoder.3.net")
# Transposed convolutions by name, with the channels that come out of each.
_GROWING = {"decoder.4": 128, "decoder.6": 64, "decoder.8": 32, "decoder.10": 16}


@dataclass(frozen=True)
class _Array:
    """A Tensor in memory."""

    name: str
    file: Path
    values: NDArray[np.float32]
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def elements(self) -> int:
        return self.values.size

    def raw(self) -> Raw:
        return self.values

    def float32(self) -> NDArray[np.float32]:
        return self.values

    def blocks(self) -> Iterator[Raw]:
        yield self.values.reshape(-1)


def shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the decoder needs, by their names in the file."""
    made: dict[str, tuple[int, ...]] = {_CODEBOOK: (N_ENTRIES, _WIDTH)}
    convolutions = {"decoder.0": (_CHANNELS, _WIDTH, 1, 1)}
    for block in _RESIDUAL:
        sides = {f"{block}.0": 3, f"{block}.2": 3, f"{block}.4": 1}
        convolutions |= {n: (_CHANNELS, _CHANNELS, side, side) for n, side in sides.items()}
    width = _CHANNELS
    for name, out in _GROWING.items():
        made |= {f"{name}.weight": (width, out, 4, 4), f"{name}.bias": (out,)}
        width = out
    convolutions["decoder.12"] = (1, width, 1, 1)
    for name, shape in convolutions.items():
        made |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return made


def read(path: Path) -> Weights:
    """The decoder's tensors in big_vision's vae-oid.npz; what belongs to its encoder is left out.
    Raises SourceError.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, NpzFile):
            raise ValueError("not an archive of arrays")
        with file:
            found: dict[str, NDArray[Any]] = {n: file[n] for n in shapes() if n in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise SourceError(f"{path}: cannot be read as an npz file ({reason})") from None
    tensors = {}
    for name, shape in shapes().items():
        if name not in found:
            raise SourceError(f"{path}: has no {name}; the file is big_vision's vae-oid.npz")
        values = found[name]
        if values.shape != shape or values.dtype.kind != "f":
            raise SourceError(f"{path}: {name} is {values.dtype} {values.shape}, not {shape}")
        tensors[name] = _Array(name, path, np.ascontiguousarray(values, np.float32))
        check_finite(tensors[name], tensors[name].values, "F32")
    return tensors


def write(tensors: Weights, folder: Path, report: Report | None) -> Path:
    """Writes the graph: one-hot codes float32 [n, 16, 128] -> masks float32 [n, 1, 64, 64]."""
    from edgevlm.export.onnx.graph import Builder, Value

    b = Builder(
        "codes",
        (N_CODES, N_ENTRIES),
        tensors,
        Stage(report, "masks", len(tensors), "tensors").advance,
    )

    def relu(x: Value) -> Value:
        return b.apply("Relu", x.name.partition("/")[0], x)

    rows = b.matmul(_CODEBOOK, b.input, b.weight(_CODEBOOK))
    grid = b.transpose(_CODEBOOK, rows, 1, 0)
    x = relu(b.conv("decoder.0", b.reshape(_CODEBOOK, grid, _WIDTH, _SIDE, _SIDE)))
    for name in _RESIDUAL:
        y = relu(b.conv(f"{name}.0", x, pad=1))
        y = relu(b.conv(f"{name}.2", y, pad=1))
        x = b.apply("Add", name, x, b.conv(f"{name}.4", y))
    for name in _GROWING:
        x = relu(b.grown(name, x))
    target = folder / FILE
    b.write(b.conv("decoder.12", x), "masks", target)
    return target
