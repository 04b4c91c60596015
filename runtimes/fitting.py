"""Frames a second of which a video fits into the context."""

from __future__ import annotations

import math
from dataclasses import replace

from edgevlm.films import filmed
from edgevlm.image.plan import plan
from edgevlm.prompt import Text, Tokens, laid_out
from edgevlm.runtimes.bitmaps import Clip
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.views import Views, video_spec

# An answer that nobody bounded need not have all that it might.
_ROOM = 4
# Text that is tokenized with its neighbours may take so many tokens more than by itself.
_NEIGHBOURS = 4
# A frame so much larger than it is has as many pixels as any.
_LARGE = 8


def fps_that_fits(model: Engines, seen: Views, n: int, wanted: int) -> float | None:
    """Frames a second of which the longest video of `seen` leaves room for an answer of `wanted`
    tokens, or for a quarter of the context, where there are `n` rows now; None where nothing does,
    and without a video.
    """
    clip = max(seen.clips.values(), key=lambda c: len(c.frames), default=None)
    if clip is None or clip.film.duration <= 0:
        return None
    context = model.manifest.decoder.context_length
    now = len(clip.frames)
    room = context - min(wanted, context // _ROOM) - (n - _rows(model, clip, now))
    step = 2 if video_spec(model.manifest).pairs else 1
    least = max(step, video_spec(model.manifest).least)
    for fewer in range((now - 1) // step * step, least - 1, -step):
        if _rows(model, clip, fewer) + _NEIGHBOURS <= room:
            return _floored(fewer / clip.film.duration)
    return None


def _rows(model: Engines, clip: Clip, n: int) -> int:
    """Rows of `n` frames of a video with the texts around them."""
    manifest, video = model.manifest, video_spec(model.manifest)
    then, now = (video.image(manifest.image, count) for count in (n, len(clip.frames)))
    width, height = clip.frames[0].size
    if not video.pairs:
        return n * plan(width, height, then).rows + _tokens(model, clip, n)
    # Fewer may be larger, where what they were read from is larger than they are.
    if plan(width * _LARGE, height * _LARGE, now).rows < 1.25 * plan(width, height, now).rows:
        width, height = width * _LARGE, height * _LARGE
    return -(-n // 2) * plan(width, height, then).rows


def _tokens(model: Engines, clip: Clip, n: int) -> int:
    """Tokens of the texts around `n` frames, as those of the first two take them."""
    first, *second = (_tokens_of(model, clip, k) for k in (1, 2)[: len(clip.frames)])
    return first + (n - 1) * (second[0] - first if second else 0)


def _tokens_of(model: Engines, clip: Clip, n: int) -> int:
    prompt, spec = model.manifest.prompt, video_spec(model.manifest).image(model.manifest.image, n)
    segments = filmed(replace(clip.film, times=clip.film.times[:n]), prompt, range(n))
    plans = [frame.plan(spec) for frame in clip.frames[:n]]
    written = laid_out(segments, plans, prompt.picture)
    texts = sum(len(model.tokenize(s.text)) for s in written if isinstance(s, Text))
    return texts + sum(len(s.ids) for s in written if isinstance(s, Tokens))


def _floored(fps: float) -> float:
    """The number with two digits that is not above."""
    digits = 1 - math.floor(math.log10(fps))
    return float(math.floor(fps * 10**digits) / 10**digits)
