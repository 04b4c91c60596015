"""Pictures that a request shows the encoder: those of questions, and frames of their videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgevlm.errors import PromptError
from edgevlm.films import filmed
from edgevlm.image.plan import among
from edgevlm.image.planned import Plan
from edgevlm.manifest import Manifest
from edgevlm.prompt import Exchange, Segment
from edgevlm.runtimes.bitmaps import Bitmap, Clip, Shown, ShownSource, is_film
from edgevlm.runtimes.places import Reel, film_step
from edgevlm.specs import ImageSpec, VideoSpec
from edgevlm.video import Video


@dataclass(frozen=True)
class Views:
    """Pictures for the encoder, of all that comes with questions.

    `specs` say what each picture is planned by, `spans` which pictures each item became. `clips`
    are the items that are videos, by number, `films` their segments, `reels` those whose pictures
    are pairs of frames.
    """

    pictures: list[Bitmap]
    specs: tuple[ImageSpec, ...]
    spans: tuple[range, ...]
    clips: Mapping[int, Clip]
    films: Mapping[int, Sequence[Segment]]
    reels: tuple[Reel, ...]

    @property
    def plans(self) -> list[Plan]:
        """The way of each picture to the encoder; raises ImageError where there is none."""
        return [p.plan(spec) for p, spec in zip(self.pictures, self.specs, strict=True)]


def video_spec(manifest: Manifest) -> VideoSpec:
    """Raises PromptError for a model that was not trained on videos."""
    if manifest.prompt.video is None:
        raise PromptError(
            f"{manifest.name}: it was not trained on videos, or its bundle is older than those and "
            "has to be exported again; ask about frames of it as pictures"
        )
    return manifest.prompt.video


def check_film(manifest: Manifest, *, alone: bool) -> None:
    """Raises PromptError for a video that the model cannot be shown; `alone` is one that is all
    that comes with the first question.
    """
    if not video_spec(manifest).turn and not alone:
        raise PromptError(
            f"{manifest.name}: its bundle knows a video alone, with the first question; export it "
            "again for others"
        )


def kinds(
    manifest: Manifest, exchanges: Sequence[Exchange], images: Sequence[ShownSource]
) -> list[Exchange]:
    """The exchanges, with those marked that a video opens; raises PromptError for a video that the
    model cannot be shown.
    """
    found, films = list[Exchange](), [is_film(image) for image in images]
    for i, exchange in enumerate(exchanges):
        its, films = films[: exchange.n_pictures], films[exchange.n_pictures :]
        if any(its):
            check_film(manifest, alone=not i and len(its) == 1)
        found.append(replace(exchange, film=its[:1] == [True]))
    return found


def check_number(manifest: Manifest, images: Sequence[ShownSource]) -> None:
    """Raises PromptError for more pictures, or frames of a video, than the model takes."""
    most, n = manifest.image.max_pictures, sum(not is_film(image) for image in images)
    if n > most:
        raise PromptError(f"{n} pictures in one request; this model takes {most}")
    for video in images:
        if isinstance(video, Video | Clip) and len(video.frames) > video_spec(manifest).most:
            raise PromptError(
                f"{len(video.frames)} frames in one request; this model takes "
                f"{video_spec(manifest).most} of a video, evenly"
            )


def views(manifest: Manifest, shown: Sequence[Shown]) -> Views:
    """The pictures to encode; raises PromptError for frames that the model cannot be shown."""
    still = among(manifest.image, sum(isinstance(one, Bitmap) for one in shown))
    pictures, specs, spans = list[Bitmap](), list[ImageSpec](), list[range]()
    clips, films, reels = dict[int, Clip](), dict[int, list[Segment]](), list[Reel]()
    for i, one in enumerate(shown):
        its, spec = [one] if isinstance(one, Bitmap) else [], still
        if isinstance(one, Clip):
            video = video_spec(manifest)
            its, spec = [*one.frames], video.image(manifest.image, len(one.frames))
            its = one.pairs if video.pairs else its
        span = range(len(pictures), len(pictures) + len(its))
        if isinstance(one, Clip):
            clips[i], films[i] = one, filmed(one.film, manifest.prompt, span)
            if video.pairs:
                reels.append(Reel(span, film_step(video, one.film)))
        pictures += its
        specs += [spec] * len(its)
        spans.append(span)
    return Views(pictures, tuple(specs), tuple(spans), clips, films, tuple(reels))
