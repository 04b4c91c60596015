"""The source models, run in float32 by code that is not edgevlm's: what bundles are compared with.

One module for each family, named as the family is, with a class `Reference`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgevlm.export.components import Job

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ParityRequest:
    """The question to both sides: picture uint8 [h, w, 3], the user's words, number of tokens."""

    image: NDArray[np.uint8]
    prompt: str
    n_tokens: int


class SourceModel(Protocol):
    """A source model."""

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """The ids of each text by itself, without special tokens.

        With `plain` what reads like a special token is text as any other.
        """

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """Reads the request and then `tokens`, one at a time.

        Returns pixels [1, 3, size, size], features [1, patches, width], embeddings
        [1, rows, n_embd], prompt_ids [text tokens] and logits [1 + len(tokens), n_vocab].
        """


@runtime_checkable
class RegionSource(Protocol):
    """A source model that finds objects out of its decoder's last layer."""

    def bins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows [n, n_embd] -> logits [n, bins] of places, widths and heights."""

    def rows(self, places: NDArray[np.float32]) -> NDArray[np.float32]:
        """Places, widths and heights [n, 3] -> rows [n, 2, n_embd], of the place and of the
        size.
        """


def of(job: Job) -> SourceModel:
    """The source of an export; raises EngineMissing without torch and transformers."""
    module = importlib.import_module(f"edgevlm.export.parity.references.{job.family.name}")
    source: SourceModel = module.Reference(job)
    return source
