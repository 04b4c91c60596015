"""Videos -> frames with their times, as many and as large as a model is shown.

PyAV reads them (`pip install "edgevlm[video]"`). Frames of uneven length are counted as if they
were even, as the models' own processors do. Sound is not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.errors import EngineMissing, ImageError, PromptError
from edgevlm.image.names import located
from edgevlm.image.pixels import RESAMPLE
from edgevlm.image.plan import plan
from edgevlm.image.read import RGB
from edgevlm.image.urls import one_line
from edgevlm.specs import ImageSpec, VideoSpec

# Reading goes frame by frame from the begin: so long a video takes minutes.
_MOST_FRAMES = 10_000_000
# A frame of 8192 x 8192 is 200 MB while it is read.
_MOST_PIXELS = 1 << 26
# Playlists are among FFmpeg's formats: they name other files and addresses, which nobody asked for.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,"
    "asf,gif",
    "protocol_whitelist": "file",
}


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    frames: RGB uint8 [h, w, 3] each, in order. times: seconds from its begin to each of them.
    duration: of all of it, in seconds. fps: how many a second were asked for, which some models
    are told; None is what the times say. `VLM.read_video` makes one of a file; whoever has frames
    of another origin makes one of those.

    >>> import numpy as np
    >>> frames = list(np.zeros((3, 48, 64, 3), np.uint8))
    >>> edgevlm.Video(frames, times=(0.0, 0.5, 1.0), duration=1.5)
    <Video of 3 frames in 1.5 s>
    """

    frames: Sequence[RGB]
    times: Sequence[float]
    duration: float
    fps: float | None = None

    def __post_init__(self) -> None:
        if not len(self.frames) or len(self.frames) != len(self.times):
            raise PromptError(f"a video of {len(self.frames)} frames has {len(self.times)} times")
        if not all(0 <= t < math.inf for t in (*self.times, self.duration)):
            raise PromptError("times of a video are seconds from its begin, 0 and more")
        check_fps(self.fps)

    def __repr__(self) -> str:
        return f"<Video of {len(self.frames)} frames in {self.duration:g} s>"


def read_video(
    source: str | os.PathLike[str], spec: VideoSpec, image: ImageSpec, fps: float | None = None
) -> Video:
    """Reads the frames of a file that a model is shown, no larger than it sees them.

    image: the spec of its pictures. fps: frames a second in place of the model's own, with its
    bound on their number. Raises EngineMissing without PyAV, ImageError for a file that is not a
    video, PromptError for an fps that is not above 0 or more than the model knows.
    """
    check_fps(fps)
    time_step(spec, spec.fps if fps is None else fps)
    try:
        import av
    except ImportError:
        raise EngineMissing(
            "reading videos needs PyAV (av is not there)", 'pip install "edgevlm[video]"'
        ) from None
    name = os.fspath(source)
    place = located(name)
    if isinstance(place, str):
        raise ImageError(name, "is not a file; videos are read from files alone")
    try:
        with place.open("rb") as file, closing(av.open(file, options=_OPTIONS)) as container:
            return _read(name, container, spec, image, fps)
    except (av.FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or one_line(e)
        raise ImageError(name, f"cannot be read as a video ({reason})") from None


def _read(name: str, container: Any, spec: VideoSpec, image: ImageSpec, fps: float | None) -> Video:
    if not container.streams.video:
        raise ImageError(name, "has no pictures that move; a video is wanted")
    stream = container.streams.video[0]
    n, rate = stream.frames or _counted(container), float(stream.average_rate or 0)
    if stream.width * stream.height > _MOST_PIXELS:
        raise ImageError(
            name, f"has frames of {stream.width} x {stream.height} pixels; make it smaller"
        )
    if not 0 < n <= _MOST_FRAMES or not 0 < rate < math.inf:
        raise ImageError(name, f"has {n} frames, {rate:g} a second; that is not a video")
    wanted = chosen(n, rate, spec, fps)
    container.seek(0)
    seen = spec.image(image, len(wanted))
    frames = [_small(frame, seen) for frame in _picked(container, wanted)]
    if not frames:
        raise ImageError(name, "has no frame that can be read")
    times = tuple(float(i / rate) for i in wanted[: len(frames)])
    return Video(frames, times, n / rate, spec.fps if fps is None else fps)


def check_fps(fps: float | None) -> None:
    """Raises PromptError for frames a second that nothing can have; None is not said."""
    if fps is not None and not 0 < fps < math.inf:
        raise PromptError(f"fps is {fps:g}; only a number above 0 is known")


def time_step(spec: VideoSpec, fps: float) -> int:
    """Positions in time between two pairs of frames, which are `fps` a second.

    Raises PromptError for so many that all would be at one time: the original counts whole seconds.
    """
    if not spec.per_second:
        return 1
    # In float32, as the original hands them over.
    seconds = int(np.float32(2 / fps))
    if not seconds:
        raise PromptError(
            f"{fps:g} frames a second are too many for this model, which counts time in whole "
            "seconds for two of them; take 2 a second or fewer (fps)"
        )
    return seconds * spec.per_second


def _counted(container: Any) -> int:
    """The frames of a file that does not say how many it has."""
    return sum(1 for packet in container.demux(video=0) if packet.size)


def chosen(n: int, rate: float, spec: VideoSpec, fps: float | None = None) -> npt.NDArray[np.intp]:
    """Numbers of the frames that are taken of `n`, `rate` a second (transformers 4.57,
    SmolVLMVideoProcessor.sample_frames and, of pairs, Qwen2VLVideoProcessor.sample_frames).
    """
    duration, each = n / rate, spec.fps if fps is None else fps
    if spec.pairs:
        return _first_of_stretches(n, duration * each, spec)
    first, last = 0, n - 1
    if duration - 2 * spec.skip > spec.most * each:
        first, last = int(spec.skip * rate), min(int(n - spec.skip * rate), n - 1)
    if first >= last:
        first, last = 0, n - 1
    count = max(min(round(each * duration), spec.most), 1)
    return np.unique(np.linspace(first, last, count, dtype=int))


def _first_of_stretches(n: int, wanted: float, spec: VideoSpec) -> npt.NDArray[np.intp]:
    most = min(spec.most, n) // 2 * 2
    # The original takes none of a video of one frame, and fails.
    count = max(int(min(max(wanted, spec.least), most)) // 2 * 2, 1)
    # It computes them in float32, where some are the frame beside.
    return np.arange(count, dtype=np.intp) * n // count


def _picked(container: Any, wanted: npt.NDArray[np.intp]) -> Iterator[Any]:
    kept = {int(i) for i in wanted}
    for i, frame in enumerate(container.decode(video=0)):
        if i in kept:
            yield frame
        if i >= wanted[-1]:
            return


def _small(frame: Any, image: ImageSpec) -> RGB:
    """A frame upright, resized as the model's plan does it anyhow: done twice it is the same."""
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
    height, width = rgb.shape[:2]
    planned = plan(width, height, image)
    size = planned.resized or (width, height)
    if image.native and plan(*planned.canvas, image).canvas == planned.canvas:
        size = planned.canvas
    drawn = Image.fromarray(np.ascontiguousarray(rgb)).resize(size, RESAMPLE[image.resample])
    small: RGB = np.asarray(drawn)
    return small
