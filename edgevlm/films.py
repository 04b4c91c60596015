"""Videos in a prompt: their pictures with the texts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from edgevlm.prompt import Image, Segment, Text, numbered, segment_of
from edgevlm.specs import PictureLayout, PromptSpec

_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Film:
    """Pictures that are the frames of a video.

    Their times and its duration are in seconds; `fps` is how many a second were asked for, None
    where they come from elsewhere.
    """

    times: tuple[float, ...]
    duration: float
    fps: float | None = None


def with_films(
    segments: Sequence[Segment], spans: Sequence[range], films: Mapping[int, Sequence[Segment]]
) -> list[Segment]:
    """The pictures of questions, counted with videos as one each, as those that the encoder sees:
    `spans` are the numbers of these for each, `films` the segments of each that is a video.
    """
    out: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Image):
            out += films.get(segment.index, [Image(i) for i in spans[segment.index]])
        else:
            out.append(segment)
    return out


def filmed(film: Film, spec: PromptSpec, pictures: range) -> list[Segment]:
    """A video's pictures, frames or pairs of frames, with the texts around them."""
    video, layout = spec.video, spec.picture or PictureLayout(whole=("{image}",))
    assert video
    words = {"{count}": in_words(len(film.times)), "{duration}": clock(film.duration)}
    out = [segment_of(numbered(video.opening, words), layout)]
    for i, picture in enumerate(pictures):
        if video.frame:
            out.append(Text(numbered(video.frame, {"{time}": moment(film.times[i])})))
        out.append(Image(picture))
    return [*out, segment_of(video.closing, layout)]


def in_words(n: int) -> str:
    """A number from 0 to 99 in English, a larger one in digits."""
    if n < len(_TEENS):
        return _TEENS[n]
    tens, ones = divmod(n, 10)
    if tens > len(_TENS) + 1:
        return str(n)
    return _TENS[tens - 2] + (f"-{_TEENS[ones]}" if ones else "")


def clock(seconds: float) -> str:
    """A duration as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


def moment(seconds: float) -> str:
    """A time as MM:SS."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
