"""Headers of safetensors files: tensors are read, or the file is refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from edgevlm.export.checkpoint.source import read_file
from workshop.fuzz.mutate import changed, damaged, dumped
from workshop.fuzz.outcomes import Wrong

_HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [1], "data_offsets": [32, 40]},
    "empty": {"dtype": "F16", "shape": [0, 3], "data_offsets": [40, 40]},
}
_DATA = bytes(40)
_LENGTHS = (0, 1, 2, 99_999_999, 2**31, 2**63, 2**64 - 1)


class Fuzzed:
    """The reader of weight files in safetensors' format."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.safetensors"

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        if rng.random() < 0.2:
            text = json.dumps(_HEADER).encode()
            return damaged(struct.pack("<Q", len(text)) + text + _DATA, rng)
        header = dumped(changed(_HEADER, rng), rng)
        length = len(header) if rng.random() < 0.95 else rng.choice(_LENGTHS)
        return struct.pack("<Q", length) + header + _DATA

    def check(self, data: bytes) -> None:
        """See Target."""
        self._path.write_bytes(data)
        for tensor in read_file(self._path).tensors.values():
            if tensor.dtype not in ("F32", "F16", "BF16"):
                continue
            if tensor.elements > len(data) or tensor.float32().shape != tensor.shape:
                raise Wrong(f"{tensor.name} {tensor.shape} in {len(data)} bytes")
