"""Tensors that are computed from a checkpoint's own when their values are asked for.

Nothing is read before that, so a decoder of gigabytes is rewritten one matrix at a time. Does not
know what any of them means; the parts' rooms do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.checkpoint.tensors import Raw, Tensor, check_finite, stored, to_float32


@dataclass(frozen=True)
class _Computed:
    """Base of the computed tensors; `name` and `file` stand in messages."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def raw(self) -> Raw:
        """The values in `dtype`; each kind says how."""
        raise NotImplementedError

    def float32(self) -> NDArray[np.float32]:
        """The values in `shape`."""
        return to_float32(self.raw(), self.dtype)

    def blocks(self) -> Iterator[Raw]:
        """The flat values, in one block."""
        yield self.raw().reshape(-1)


@dataclass(frozen=True)
class _Zeros(_Computed):
    def raw(self) -> Raw:
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True)
class _Constant(_Computed):
    values: NDArray[np.float32]

    def raw(self) -> Raw:
        return self.values


@dataclass(frozen=True)
class _Dequantized(_Computed):
    type: str
    offset: int
    n_bytes: int

    def raw(self) -> Raw:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = stored(self.file, self.offset, self.n_bytes, np.dtype(np.uint8))
        values: Raw = dequantize(blocks, GGMLQuantizationType[self.type]).reshape(self.shape)
        check_finite(self, values, self.dtype)
        return values


@dataclass(frozen=True)
class _Picked(_Computed):
    source: Tensor
    axes: tuple[int, ...]
    axis: int
    index: int
    count: int

    def raw(self) -> Raw:
        apart = self.source.raw().reshape(*self.axes, *self.shape[1:])
        taken = range(self.index, self.index + self.count)
        return np.ascontiguousarray(apart.take(taken, self.axis).reshape(self.shape))


@dataclass(frozen=True)
class _Reshaped(_Computed):
    source: Tensor

    def raw(self) -> Raw:
        return self.source.raw().reshape(self.shape)


@dataclass(frozen=True)
class _Transposed(_Computed):
    source: Tensor

    def raw(self) -> Raw:
        return np.ascontiguousarray(self.source.raw().T)


@dataclass(frozen=True)
class _Stacked(_Computed):
    parts: tuple[Tensor, ...]

    def raw(self) -> Raw:
        if self.dtype == self.parts[0].dtype:
            return np.concatenate([p.raw() for p in self.parts])
        return np.concatenate([p.float32() for p in self.parts])


@dataclass(frozen=True)
class _Adapted(_Computed):
    base: Tensor
    down: Tensor
    up: Tensor
    scale: float
    turned: bool

    def raw(self) -> Raw:
        # A convolution's are those of its patches, laid out flat.
        down = self.down.float32().reshape(self.down.shape[0], -1)
        product = self.up.float32().reshape(self.up.shape[0], -1) @ down
        more = product.T if self.turned else product
        return self.base.float32() + np.float32(self.scale) * more.reshape(self.shape)


@dataclass(frozen=True)
class _Made(_Computed):
    of: Mapping[str, Tensor]
    change: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.float64]]

    def raw(self) -> Raw:
        with np.errstate(all="ignore"):
            values = self.change({n: t.float32().astype(np.float64) for n, t in self.of.items()})
            out: Raw = values.reshape(self.shape).astype(np.float32)
        check_finite(self, out, self.dtype)
        return out


def constant(name: str, values: NDArray[np.float32]) -> Tensor:
    """A tensor of these values, which lie in no file."""
    return _Constant(name, Path(), "F32", values.shape, values)


def dequantized(
    name: str, file: Path, shape: tuple[int, ...], type: str, offset: int, n_bytes: int
) -> Tensor:
    """A tensor that lies in a file in blocks of a ggml type ("Q8_0"), as float32."""
    return _Dequantized(name, file, "F32", shape, type, offset, n_bytes)


def zeros(like: Tensor, name: str) -> Tensor:
    """Float32 zeros of another tensor's shape."""
    return _Zeros(name, like.file, "F32", like.shape)


def rows(source: Tensor, axes: tuple[int, ...], axis: int, index: int, count: int = 1) -> Tensor:
    """One of several matrices whose rows lie fused in `source`.

    The rows [n, ...] are seen as `axes` (their product is n), of which `axis` is taken from `index`
    on, `count` times.
    """
    shape = (math.prod(axes) // axes[axis] * count, *source.shape[1:])
    return _Picked(source.name, source.file, source.dtype, shape, source, axes, axis, index, count)


def reshaped(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values of `source` in another shape of as many."""
    return _Reshaped(source.name, source.file, source.dtype, shape, source)


def transposed(source: Tensor) -> Tensor:
    """A matrix with its rows as columns."""
    return _Transposed(source.name, source.file, source.dtype, source.shape[::-1], source)


def stacked(parts: tuple[Tensor, ...], name: str) -> Tensor:
    """Tensors one below the other; float32 where their types differ."""
    dtypes = {p.dtype for p in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return _Stacked(name, parts[0].file, dtype, shape, parts)


def adapted(
    base: Tensor, down: Tensor, up: Tensor, scale: float, *, turned: bool = False
) -> Tensor:
    """base [n, m] + scale * up [n, r] @ down [r, m], float32: a low-rank adapter, merged.

    Of a table that is looked up row by row the product is `turned`: (up [m, r] @ down [r, n]).T.
    """
    return _Adapted(base.name, base.file, "F32", base.shape, base, down, up, scale, turned)


def made(
    of: Mapping[str, Tensor],
    shape: tuple[int, ...],
    change: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.float64]],
) -> Tensor:
    """Float32 values of that shape, made by `change` in float64 of those of several tensors."""
    first = next(iter(of.values()))
    return _Made(first.name, first.file, "F32", shape, of, change)
