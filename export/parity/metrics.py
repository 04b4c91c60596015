"""Distances between two engines' numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def distance(a: Array, b: Array) -> float:
    """The largest 1 - cosine between rows (last axis) of two arrays of one shape; infinite where
    the arrays hold something else than numbers. Two rows of zeros are the same, as those of a
    Gemma 3 whose connector nobody has trained.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = [np.linalg.norm(each, axis=-1) for each in (x, y)]
    norms = lengths[0] * lengths[1]
    apart = np.where(lengths[0] + lengths[1] == 0, 0.0, 1.0)
    worst = float((apart - (x * y).sum(-1) / np.maximum(norms, 1e-30)).max())
    return worst if np.isfinite(worst) else float("inf")


def shared(logits: Array, source: Array) -> tuple[Array, Array]:
    """Both float64, with those columns alone that neither has -inf in: a decoder that was trimmed
    has no logits of the tokens that it cannot write.
    """
    columns = ~(np.isneginf(logits).all(axis=0) | np.isneginf(source).all(axis=0))
    return logits[:, columns].astype(np.float64), source[:, columns].astype(np.float64)


def divergence(logits: Array, source: Array) -> float:
    """Mean over rows of KL(source || logits), in nats; both [rows, n_vocab]."""
    ours, theirs = _log_softmax(logits), _log_softmax(source)
    return float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean())


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    shifted: Array = wide - wide.max(axis=-1, keepdims=True)
    total: Array = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - total
