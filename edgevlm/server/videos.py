"""Videos of a request: their frames are read when its turn comes, within its limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from anyio import to_thread

from edgevlm.errors import EngineMissing, ImageError
from edgevlm.runtimes.messages import ImagePart, Message, Part, TextPart
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.views import video_spec
from edgevlm.server.limits import Limits
from edgevlm.server.messages import ReadMessage, VideoFilePart
from edgevlm.server.pictures import VideoFile
from edgevlm.server.problems import Problem, invalid, log
from edgevlm.video import Video, Watch, read_video


async def with_frames(vlm: VLM, messages: Sequence[ReadMessage], limits: Limits) -> list[Message]:
    """The messages with the frames of their videos, for this model. Raises Problem, PromptError.

    Reading ends within a frame where the request is given up.
    """
    over = threading.Event()
    try:
        return await to_thread.run_sync(
            _with_frames, vlm, messages, limits, over, abandon_on_cancel=True
        )
    finally:
        over.set()


def _with_frames(
    vlm: VLM, messages: Sequence[ReadMessage], limits: Limits, over: threading.Event
) -> list[Message]:
    until = time.monotonic() + min(limits.upload_seconds, limits.seconds)

    def read(part: TextPart | ImagePart | VideoFilePart) -> Part:
        if part["type"] != "video":
            return part
        file = part["video"]
        return {"type": "video", "video": _read(vlm, file, _Limited(file, limits, until, over))}

    found: list[Message] = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, str) else [read(part) for part in content]
        found.append({"role": message["role"], "content": parts})
    return found


def _read(vlm: VLM, file: VideoFile, watch: Watch) -> Video:
    try:
        return read_video(file.data, video_spec(vlm.manifest), vlm.manifest.image, file.fps, watch)
    except ImageError as e:
        raise invalid(str(e), file.param, "invalid_video") from None
    except EngineMissing as e:
        log.error("%s", e)
        raise invalid(
            "this server cannot read videos: PyAV is not installed with it",
            file.param,
            "videos_not_available",
        ) from None


class _Limited(Watch):
    """Ends the reading of a video that is larger or takes longer than requests may."""

    def __init__(
        self, file: VideoFile, limits: Limits, until: float, over: threading.Event
    ) -> None:
        self._param, self._limits, self._until, self._over = file.param, limits, until, over

    def size(self, name: str, width: int, height: int) -> None:
        """See Watch; raises Problem."""
        most = self._limits.pixels
        if width * height > most:
            raise self._too_large(
                f"a video has frames of {width} x {height} pixels, more than {most / 1e6:g} "
                "megapixels; scale it down"
            )
        super().size(name, width, height)

    def frame(self) -> None:
        """See Watch; raises Problem."""
        if self._over.is_set() or time.monotonic() > self._until:
            seconds = min(self._limits.upload_seconds, self._limits.seconds)
            raise self._too_large(
                f"the videos could not be read within {seconds:g} seconds; send shorter ones"
            )

    def _too_large(self, message: str) -> Problem:
        return Problem(413, message, param=self._param, code="video_too_large")
