"""Films in the containers that are read, damaged: each is read or refused."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from edgevlm.specs import ImageSpec, VideoSpec
from edgevlm.video import read_video
from workshop.fuzz.mutate import damaged
from workshop.fuzz.outcomes import Wrong

# Containers with a codec that PyAV's wheels write in each.
_FORMS = (
    *(("mp4", "mpeg4"), ("mov", "mjpeg"), ("mp4", "libx264"), ("3gp", "h263"), ("avi", "mpeg4")),
    *(("avi", "msmpeg4v2"), ("matroska", "ffv1"), ("webm", "libvpx"), ("webm", "libvpx-vp9")),
    *(("mpegts", "mpeg2video"), ("mpeg", "mpeg1video"), ("flv", "flv"), ("ogg", "libtheora")),
    *(("asf", "wmv2"), ("gif", "gif")),
)
_SIZE = (176, 144)  # h263 has no other of this kind.
_FRAMES = 12
_IMAGE = ImageSpec(48, 9, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_SPECS = (
    VideoSpec(fps=2.0, most=6, template=("{image}",), longest_edge=48),
    VideoSpec(fps=2.0, most=6, template=("{image}",), longest_edge=48, pairs=True, least=4),
)


class Fuzzed:
    """The reader of videos."""

    def __init__(self, folder: Path) -> None:
        self._seeds = list(_films())

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        return damaged(rng.choice(self._seeds), rng, rng.choice((None, None, 64, 600)))

    def check(self, data: bytes) -> None:
        """See Target."""
        for spec in _SPECS:
            video = read_video(data, spec, _IMAGE)
            if not 0 < len(video.frames) <= spec.most or len(video.times) != len(video.frames):
                raise Wrong(f"{len(video.frames)} frames and {len(video.times)} times")


def _films() -> Iterator[bytes]:
    for form, codec in _FORMS:
        if codec in av.codecs_available:
            yield _film(form, codec)


def _film(form: str, codec: str) -> bytes:
    file = io.BytesIO()
    opened: Any = av.open(file, mode="w", format=form)
    with opened as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = _SIZE
        if formats := stream.codec_context.codec.video_formats:
            stream.pix_fmt = formats[0].name
        for i in range(_FRAMES):
            rgb = np.full((*_SIZE[::-1], 3), (30, 60, 120), np.uint8)
            rgb[8 * i :][:8] = (250, 200, 10)
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
