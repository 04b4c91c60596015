"""Single rows of the token-embedding table, dequantized from the GGUF file on demand.

A prefix-LM needs token embeddings beside image embeddings in one batch, and llama.cpp does
not hand any out. The table (half a gigabyte in PaliGemma) stays on disk, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt
from edgevlm.specs import DecoderSpec, TensorLocation
from edgevlm.submodules import submodule

_gguf = submodule("gguf.quants")
# Graphs of llama.cpp's that multiply the token embeddings of a batch of tokens by sqrt(n_embd), and
# a batch of embeddings by nothing.
_SCALES_TOKENS = ("gemma3",)


class EmbeddingRows:
    """The token-embedding table [rows, width] at a location in a GGUF file, as the layers of the
    decoder of `spec` see it.
    """

    def __init__(self, path: Path, location: TensorLocation, spec: DecoderSpec) -> None:
        try:
            self._type = _gguf.GGMLQuantizationType[location.type]
        except KeyError:
            raise BundleCorrupt(
                path, f"token embeddings of unknown type {location.type!r}"
            ) from None
        if location.width != spec.n_embd or location.rows < spec.n_vocab or location.offset < 0:
            raise BundleCorrupt(
                path,
                f"token embeddings [{location.rows}, {location.width}] at {location.offset} of a "
                f"decoder of [{spec.n_vocab}, {spec.n_embd}]",
            )
        block, block_bytes = _gguf.GGML_QUANT_SIZES[self._type]
        row_bytes = location.width // block * block_bytes
        if location.offset + location.rows * row_bytes > path.stat().st_size:
            raise BundleCorrupt(path, "the token embeddings reach beyond its end")
        self._table: npt.NDArray[np.uint8] = np.memmap(
            path, np.uint8, "r", location.offset, (location.rows, row_bytes)
        )
        self._scale = spec.n_embd**0.5 if spec.architecture in _SCALES_TOKENS else 1.0

    def __call__(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids -> rows float32 [n, width]."""
        rows = self._stored(tokens)
        return rows if self._scale == 1.0 else rows * np.float32(self._scale)

    def _stored(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        raw = np.ascontiguousarray(self._table[np.asarray(tokens, np.int64)])
        if self._type == _gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32)
        if self._type == _gguf.GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32)
        rows: npt.NDArray[np.float32] = _gguf.dequantize(raw, self._type)
        return rows.astype(np.float32, copy=False)
