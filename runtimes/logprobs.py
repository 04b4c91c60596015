"""Log-probabilities of tokens, from the full softmax in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgevlm.runtimes.engines import Float, TextDecoder
from edgevlm.types import TokenLogprob


def log_softmax(logits: Float) -> npt.NDArray[np.float64]:
    """Logits float32 [..., n_vocab] -> log-probabilities float64 of the same shape."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z


def token_logprob(decoder: TextDecoder, token: int, n_top: int) -> TokenLogprob:
    """A token's log-probability after the last position read, and those of the `n_top` likeliest
    tokens, the likeliest first, the lower id first where two are equal.
    """
    all_of_them = log_softmax(decoder.logits())

    def one(token: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = decoder.piece(token)
        text = data.decode("utf-8", "replace")
        return TokenLogprob(token, text, data, float(all_of_them[token]), top)

    n_top = min(n_top, len(all_of_them))
    if not n_top:
        return one(token)
    least = np.partition(all_of_them, -n_top)[-n_top]
    likely = np.flatnonzero(all_of_them >= least)
    likely = likely[np.argsort(-all_of_them[likely], kind="stable")][:n_top]
    return one(token, tuple(one(int(i)) for i in likely))
