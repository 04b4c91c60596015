"""The questions before the last one of a conversation, as many as there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.errors import ContextOverflow
from edgevlm.prompt import Exchange
from edgevlm.runtimes.bitmaps import Shown, is_film
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.request import Request, prepare
from edgevlm.sampling import Sampling
from edgevlm.types import Reply


@dataclass(frozen=True)
class Past:
    """A question that was answered, and the pictures and videos that came with it."""

    question: str
    pictures: Sequence[Shown]
    reply: Reply


def prepare_last(
    model: Engines,
    prompt: str,
    pictures: Sequence[Shown],
    sampling: Sampling,
    history: Sequence[Past],
    *,
    system: str | None = None,
) -> tuple[Request, int]:
    """The last question of a conversation with the pictures that come with it, with as much before
    it as fits, and how many of the oldest questions were left out.

    None are as long as the answer has room for the tokens it may have, or for a quarter of the
    context. Where it has not, so many go that half the context is free: each time some go the
    decoder has to read the others again. Their pictures go with them, but for those that were shown
    last, which then come with the first question that is left.
    """
    context = model.manifest.decoder.context_length
    room = min(sampling.longest(model.manifest.answer), context // 4)
    asked = [(past.question, past.pictures, past.reply) for past in history]
    turns: list[tuple[str, Sequence[Shown], Reply | None]] = [*asked, (prompt, pictures, None)]
    shown = next((seen for _, seen, _ in reversed(turns) if seen), ())
    for left_out in range(len(turns)):
        kept = turns[left_out:]
        if not any(seen for _, seen, _ in kept):
            kept[0] = (kept[0][0], shown, kept[0][2])
        seen = [picture for _, pictures, _ in kept for picture in pictures]
        said = [Exchange(question, len(pictures), reply) for question, pictures, reply in kept]
        last = left_out == len(history)
        n_stills = sum(not is_film(one) for one in seen)
        if n_stills > model.manifest.image.max_pictures and not last:
            continue
        try:
            request = prepare(model, said, seen, sampling, system)
        except ContextOverflow:
            if last:
                raise
        else:
            if last or context - request.n_image - request.n_text >= room:
                return request, left_out
        room = context // 2
    raise AssertionError("the last question alone is answered or refused")
