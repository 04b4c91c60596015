"""Tensors that lie in no file: their shape is a published model's, their values are random."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.export.checkpoint.tensors import SourceTensor
from edgevlm.parts import Part

DEVIATION = 0.02


@dataclass(frozen=True)
class RandomTensor(SourceTensor):
    """A tensor of a part whose values are drawn when they are asked for, the same every time."""

    def float32(self) -> npt.NDArray[np.float32]:
        """Random values of a small deviation; ones for the weights of norms."""
        if len(self.shape) == 1 and self.name.endswith("weight"):
            return np.ones(self.shape, np.float32)
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return rng.standard_normal(self.shape, np.float32) * np.float32(DEVIATION)


def random_part(config: Part) -> Mapping[str, RandomTensor]:
    """The tensors of a part by canonical name."""
    return {
        name: RandomTensor(name, Path(), "F32", shape, 0)
        for name, shape in config.tensors().items()
    }
