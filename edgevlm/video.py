"""Videos -> frames with their times, as many and as large as a model is shown.

PyAV reads them (`pip install "edgevlm[video]"`). Frames of uneven length are counted as if they
were even, as the models' own processors do. Sound is not read.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import IO, Any

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
# More has no hours that a prompt could say.
_LONGEST_S = 1e9
# A frame of 8192 x 8192 is 200 MB while it is read.
_MOST_PIXELS = 1 << 26
# Of the frames that a file says it has, so many are there where it is whole: some are before its
# begin, or cannot be shown.
_SHARE = 0.9
# Playlists are among FFmpeg's formats: they name other files and addresses, which nobody asked for.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,"
    "asf,gif",
    "protocol_whitelist": "file",
}

VideoSource = str | os.PathLike[str] | bytes | bytearray | memoryview


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    frames: RGB uint8 [h, w, 3] each, in order. times: seconds from its begin to each of them.
    duration: of all of it, in seconds. fps: how many a second were asked for, which some models
    are told; None is what the times say. source: the file that it was read from. `VLM.read_video`
    makes one of a file; whoever has frames of another origin makes one of those.

    >>> import numpy as np
    >>> frames = list(np.zeros((3, 48, 64, 3), np.uint8))
    >>> edgevlm.Video(frames, times=(0.0, 0.5, 1.0), duration=1.5)
    <Video of 3 frames in 1.5 s>
    """

    frames: Sequence[RGB]
    times: Sequence[float]
    duration: float
    fps: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_times(len(self.frames), self.times, self.duration, self.fps)

    def __repr__(self) -> str:
        return f"<Video of {len(self.frames)} frames in {self.duration:g} s>"


class Watch:
    """Looks on while a video is read; what its methods raise ends that."""

    def size(self, name: str, width: int, height: int) -> None:
        """Is told how large frames are before they are decoded; raises ImageError for too large."""
        if width * height > _MOST_PIXELS:
            raise ImageError(name, f"has frames of {width} x {height} pixels; make it smaller")

    def frame(self) -> None:
        """Is told of each frame before it is looked for."""


def read_video(
    source: VideoSource,
    spec: VideoSpec,
    image: ImageSpec,
    fps: float | None = None,
    watch: Watch | None = None,
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
    name = _name(source)
    try:
        with _opened(source, name) as file, closing(av.open(file, options=_OPTIONS)) as container:
            video = _read(name, container, _Wanted(spec, image, fps), watch or Watch())
    except (av.InvalidDataError, av.ArgumentError):
        reason = "it is damaged, or not in a format of videos that is known"
    except (av.FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or one_line(e)
    else:
        return replace(video, source=name) if isinstance(source, (str, os.PathLike)) else video
    raise ImageError(name, f"cannot be read as a video ({reason})")


def _name(source: VideoSource) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the video of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    raise ImageError(
        f"an object of type {type(source).__name__}",
        "is not a video; pass a path or the bytes of a file",
    )


def _opened(source: VideoSource, name: str) -> IO[bytes]:
    """The file, at its begin; raises ImageError for an address and for what is empty."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file: IO[bytes] = io.BytesIO(source)
    else:
        place = located(name)
        if isinstance(place, str):
            raise ImageError(name, "is not a file; videos are read from files alone")
        file = place.open("rb")
    if not file.read(1):
        file.close()
        raise ImageError(name, "is empty")
    file.seek(0)
    return file


@dataclass(frozen=True)
class _Wanted:
    """The frames of a video that a model is shown."""

    spec: VideoSpec
    image: ImageSpec
    fps: float | None


def _read(name: str, container: Any, wanted: _Wanted, watch: Watch) -> Video:
    if not container.streams.video:
        raise ImageError(name, "has no pictures that move; a video is wanted")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ImageError(name, "is of a codec that is not known; convert it, to H.264 for instance")
    watch.size(name, stream.width, stream.height)
    n, rate = stream.frames or _counted(container, watch), float(stream.average_rate or 0)
    if not 0 < n <= _MOST_FRAMES or not 0 < rate < math.inf:
        raise ImageError(name, f"has {n} frames, {rate:g} a second; that is not a video")
    spec, fps = wanted.spec, wanted.fps
    numbers = chosen(n, rate, spec, fps)
    container.seek(0)
    seen = spec.image(wanted.image, len(numbers))
    taken, read = {int(i) for i in numbers}, 0
    frames = list[RGB]()
    for read, frame in enumerate(_decoded(container, name, watch), 1):
        if read - 1 in taken:
            frames.append(_small(frame, seen))
        if read > numbers[-1]:
            break
    if not frames or read < _SHARE * numbers[-1]:
        raise ImageError(name, f"is cut short or damaged: {read} of its {n} frames can be read")
    times = tuple(float(i / rate) for i in numbers[: len(frames)])
    each = spec.fps if fps is None else fps
    return Video(frames, times, n / rate, each)


def check_times(n: int, times: Sequence[float], duration: float, fps: float | None) -> None:
    """Raises PromptError for what cannot be the times of `n` frames; see Video."""
    if not n or n != len(times):
        raise PromptError(f"a video of {n} frames has {len(times)} times")
    if not all(0 <= t <= _LONGEST_S for t in (*times, duration)):
        raise PromptError(f"times of a video are seconds from its begin, from 0 to {_LONGEST_S:g}")
    check_fps(fps)


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


def _counted(container: Any, watch: Watch) -> int:
    """The frames of a file that does not say how many it has."""
    n = 0
    for packet in container.demux(video=0):
        watch.frame()
        n += packet.size > 0
    return n


def _decoded(container: Any, name: str, watch: Watch) -> Iterator[Any]:
    """All frames, one after the other."""
    watch.frame()
    for frame in container.decode(video=0):
        # It may become another one on the way.
        watch.size(name, frame.width, frame.height)
        yield frame
        watch.frame()


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
