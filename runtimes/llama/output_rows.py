"""The rows of a decoder's tables and the tokens that they stand for.

Of a decoder that was trimmed to some languages' tokens llama.cpp knows the rest alone, by numbers
of its own. Everybody else goes by the model's ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt
from edgevlm.gguf_file import KEPT, opened
from edgevlm.specs import DecoderSpec


class OutputRows:
    """The tokens that the decoder in a GGUF file has rows of; raises BundleCorrupt where they are
    not those of `spec`.
    """

    def __init__(self, path: Path, spec: DecoderSpec) -> None:
        self._n_vocab = spec.n_vocab
        self._ids = _kept(path, spec) if spec.n_output else None
        self._at = None if self._ids is None else {int(t): i for i, t in enumerate(self._ids)}

    def row(self, token: int) -> int | None:
        """The row of a token; None where it has none."""
        return token if self._at is None else self._at.get(token)

    def rows(self, tokens: Iterable[int]) -> list[int]:
        """The rows of those tokens that have one."""
        return [row for token in tokens if (row := self.row(token)) is not None]

    def token(self, row: int) -> int:
        """The token of a row."""
        return row if self._ids is None else int(self._ids[row])

    def logits(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits of the rows -> logits float32 [n_vocab] of all tokens, -inf where there is no row.

        Always memory of its own.
        """
        if self._ids is None:
            return rows.copy()
        spread = np.full(self._n_vocab, -np.inf, np.float32)
        spread[self._ids] = rows
        return spread


def _kept(path: Path, spec: DecoderSpec) -> npt.NDArray[np.int32]:
    with opened(path) as file:
        ids = file.integers(KEPT)
    if ids is None or len(ids) != spec.n_output:
        found = "none" if ids is None else str(len(ids))
        raise BundleCorrupt(path, f"lists {found} of its {spec.n_output} tokens ({KEPT})")
    if not (np.diff(ids) > 0).all() or ids[0] < 0 or ids[-1] >= spec.n_vocab:
        raise BundleCorrupt(path, f"lists tokens that are not the model's ({KEPT})")
    return ids
