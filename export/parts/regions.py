"""Moondream2's region model as two graphs: from a row of the decoder to bins, and back."""

from __future__ import annotations

import math
from pathlib import Path

from edgevlm.bundle import REGION_ROWS, REGIONS
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.onnx import storage
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import activation, linear
from edgevlm.parts.regions import Regions
from edgevlm.progress import Report, Stage

_KINDS = ("coord", "size")


def write(config: Regions, tensors: Weights, folder: Path, report: Report | None) -> list[Path]:
    """Writes both graphs and returns their files: rows float32 [n, hidden_size] -> logits [n, bins]
    of places, widths and heights; a place, a width and a height float32 [n, 3] -> rows
    [n, 2, hidden_size], that of the place and that of the size.
    """
    stage = Stage(report, "regions", len(tensors), "tensors")
    decoding = {name: t for name, t in tensors.items() if "_decoder." in name}
    encoding = {name: t for name, t in tensors.items() if name not in decoding}
    b = Builder("hidden", (config.hidden_size,), decoding, stage.advance)
    bins = b.joined("bins", [_decoded(b, kind) for kind in _KINDS], 0)
    b.write(bins, "bins", folder / REGIONS)
    b = Builder("places", (3,), encoding, stage.advance)
    coord, size = b.part("coord", b.input, 0, 0, 1), b.part("size", b.input, 0, 1, 2)
    rows = [b.wider(k, _encoded(b, k, x), 0) for k, x in zip(_KINDS, (coord, size), strict=True)]
    b.write(b.joined("rows", rows, 0), "rows", folder / REGION_ROWS)
    return [file for name in (REGIONS, REGION_ROWS) for file in storage.files(folder / name)]


def _decoded(b: Builder, kind: str) -> Value:
    x = activation(b, kind, linear(b, f"{kind}_decoder.fc1", b.input), "gelu_pytorch_tanh")
    return linear(b, f"{kind}_decoder.fc2", x)


def _encoded(b: Builder, kind: str, x: Value) -> Value:
    """Fourier features of places or sizes [n, 1 or 2], as a row."""
    turns = b.apply("Mul", kind, x, b.number(2 * math.pi))
    angles = b.matmul(kind, turns, b.weight(f"{kind}_features"))
    waves = [b.apply(wave, kind, angles) for wave in ("Cos", "Sin")]
    return linear(b, f"{kind}_encoder", b.joined(kind, waves, 0))
