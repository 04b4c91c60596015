"""Log-probabilities of given continuations of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgevlm.errors import PromptError
from edgevlm.prompt import Exchange
from edgevlm.runtimes.bitmaps import ShownSource
from edgevlm.runtimes.logprobs import log_softmax
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.sampling import Sampling


def scores(
    model: Engines,
    asked: Sequence[Exchange],
    images: Sequence[ShownSource],
    continuations: Sequence[str],
    *,
    with_end: bool,
) -> npt.NDArray[np.float64]:
    """The log-probability of each continuation of a question, float64 [n]; see VLM.score."""
    ids = [
        model.tokenize(text) + list(model.manifest.answer.stop_tokens[:1] if with_end else ())
        for text in continuations
    ]
    if not all(ids):
        raise PromptError("a continuation is empty; there is nothing to score")
    _check_writable(model, ids)
    longest = max(map(len, ids), default=1)
    request = prepare(model, asked, images, Sampling(max_tokens=longest))
    if request.max_tokens < longest:
        raise PromptError(f"a continuation of {longest} tokens does not fit the context")
    prefill(model, request, input_blocks(model, request), longest)
    first = model.decoder.logits()[None]
    found = np.zeros(len(ids))
    for i, tokens in enumerate(ids):
        after = model.decoder.extend(tokens[:-1])
        likely = log_softmax(np.concatenate([first, after]))
        found[i] = likely[range(len(tokens)), tokens].sum()
        model.decoder.rollback(request.n_image + request.n_text)
    model.keep()
    return found


def _check_writable(model: Engines, continuations: Sequence[Sequence[int]]) -> None:
    """Raises PromptError for a token that no answer of a trimmed decoder can have."""
    decoder = model.decoder
    for token in (t for ids in continuations for t in ids if not decoder.writes(t)):
        text = decoder.piece(token).decode(errors="replace")
        raise PromptError(
            f"no answer of this bundle has the token {text!r} ({token}): it was trimmed to "
            f"{', '.join(model.manifest.decoder.languages)}; score with one that was not"
        )
