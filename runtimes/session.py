"""VLM: messages and pictures in, an answer out. Knows no engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from edgevlm.family import Family
from edgevlm.image import ImageSource
from edgevlm.manifest import Manifest
from edgevlm.masks import in_picture
from edgevlm.prompt import Exchange
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.asynchronous import AsyncAnswer
from edgevlm.runtimes.bitmaps import still
from edgevlm.runtimes.chat import Chat
from edgevlm.runtimes.engines import Cancelled, TextDecoder, VisionEncoder
from edgevlm.runtimes.messages import Images, Message, parted
from edgevlm.runtimes.model import Engines, Stopwatch
from edgevlm.runtimes.request import Request, embeddings, prepare
from edgevlm.runtimes.scores import scores
from edgevlm.runtimes.tasks import Tasks
from edgevlm.runtimes.turns import Turns
from edgevlm.runtimes.views import video_spec
from edgevlm.sampling import Sampling, SamplingOptions
from edgevlm.types import Box, Devices, Placement, Progress, Reply, RunSettings
from edgevlm.video import Video, VideoSource, read_video

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class VLM(Tasks):
    """A loaded vision-language model. `edgevlm.load` makes one; close it or use it in a `with`.

    `image` is a path, URL, bytes, PIL image or array uint8 [h, w, 3], a list of those where the
    model takes several, or None; a Video may stand there, too, where the model was trained on
    those. Options are those of `edgevlm.sampling.Sampling`; without any the
    answer is greedy. `devices` says where encoder and decoder run, `settings` how.

    >>> with edgevlm.load() as vlm:
    ...     print(vlm.caption("photo.png"), vlm.devices.decoder.device)
    a red circle, a blue square, a yellow triangle and a green star cpu

    Threads may share a VLM, which answers one request at a time: another thread's waits until the
    running one has ended, in the order in which they came. An answer that is being streamed keeps
    its turn up to its end; it is given up, and raises PromptError at its next piece, where the
    thread that draws it asks something else, or where nobody has drawn from it for 10 seconds and
    another thread asks. `image_embeddings` needs no turn unless memory has room for one engine
    only.
    After `close`, and in a process that was forked after the load, every request raises
    ModelClosed; `close` ends running ones so, too. What is not closed is freed with the last
    reference to it.
    """

    def __init__(
        self,
        manifest: Manifest,
        family: Family,
        encoder: VisionEncoder,
        decoder: TextDecoder | None,
        *,
        newline: npt.NDArray[np.float32] | None = None,
        load_ms: float = 0.0,
        devices: Devices | None = None,
        vision_threads: int = 0,
        tuned: bool = False,
    ) -> None:
        self.manifest = manifest
        self.load_ms = load_ms
        self.devices = devices or _only("cpu", encoder.provider)
        self._vision_threads, self._tuned = vision_threads, tuned
        self.engines = Engines(manifest, family, encoder, decoder, newline)
        self._turns = Turns()

    def __repr__(self) -> str:
        where = f"vision on {self.devices.vision.device}, decoder on {self.devices.decoder.device}"
        return f"<VLM {self.manifest.name}: {'closed' if self._turns.closed else where}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loaded model cannot be pickled; load it in each process")

    @property
    def settings(self) -> RunSettings:
        """Settings that the engines really run with."""
        found, apart = self.engines.decoder.settings, self.engines.apart
        return replace(found, vision_threads=self._vision_threads, tuned=self._tuned, apart=apart)

    def stream(
        self,
        messages: str | Sequence[Message],
        image: Images = None,
        *,
        system: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Starts an answer; iterate over it for its pieces. Pictures are read now.

        `messages` are a conversation that ends with a question, or that question alone, about
        `image`. `system` is the system message, in place of the words that the model's template may
        have of its own. `progress` is told of tiles of pictures and of rows that the decoder reads.
        Raises ImageError, PromptError (also for a system message where the template knows none) or
        ContextOverflow before anything is computed.

        >>> with edgevlm.load() as vlm:
        ...     for piece in vlm.stream("caption en", "photo.png"):
        ...         print(piece.text, end="")
        a red circle, a blue square, a yellow triangle and a green star
        """
        sampling = Sampling.of(options)
        with self._turns.using():
            words, asked, images = parted(messages, image, system)
            request = prepare(self.engines, asked, images, sampling, words)
        return self._answer(request, progress)

    def _answer(self, request: Request, progress: Callable[[Progress], None] | None) -> Answer:
        request.progress = progress
        return Answer(self.engines, request, self._turns, load_ms=self.load_ms)

    def ask(
        self,
        messages: str | Sequence[Message],
        image: Images = None,
        *,
        system: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole answer; see `stream`.

        >>> with edgevlm.load() as vlm:
        ...     print(vlm.ask("answer en what shape is red?", "photo.png"))
        circle
        """
        return self.stream(messages, image, system=system, progress=progress, **options).finish()

    def astream(
        self,
        messages: str | Sequence[Message],
        image: Images = None,
        *,
        system: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncAnswer:
        """An answer for `async for`; see `stream` and AsyncAnswer. Several at once take turns.
        `progress` is called in another thread.
        """
        return AsyncAnswer(
            lambda: self.stream(messages, image, system=system, progress=progress, **options)
        )

    async def aask(
        self,
        messages: str | Sequence[Message],
        image: Images = None,
        *,
        system: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole answer, without blocking the event loop; see `astream`.

        >>> import asyncio
        >>> async def main() -> None:
        ...     with edgevlm.load() as vlm:
        ...         print(await vlm.aask("answer en what shape is red?", "photo.png"))
        >>> asyncio.run(main())
        circle
        """
        answer = self.astream(messages, image, system=system, progress=progress, **options)
        return await answer.finish()

    def chat(self, image: Images = None, *, system: str | None = None) -> Chat:
        """A conversation about a picture, which is read now, or about a Video; raises ImageError,
        or PromptError for a video where the model was not trained on those and for a system message
        where its template knows none.

        >>> with edgevlm.load() as vlm, vlm.chat("photo.png") as chat:
        ...     print(chat.ask("answer en what shape is red?"))
        ...     print(chat.ask("answer en what shape is blue?"))
        circle
        square
        """
        self._turns.check()
        return Chat(self, image, system)

    def read_video(self, source: VideoSource, fps: float | None = None) -> Video:
        """Reads a video's frames, of a file or its bytes, as the model was trained on them, to ask
        about; needs PyAV (`pip install "edgevlm[video]"`).

        `fps` frames a second are taken in place of the model's own number, no more in all than it
        was trained on. Raises EngineMissing, ImageError, or PromptError where the model was not
        trained on videos.
        """
        return read_video(source, video_spec(self.manifest), self.manifest.image, fps)

    def segment(
        self, objects: str | Sequence[str], image: ImageSource, **options: Unpack[SamplingOptions]
    ) -> list[Box]:
        """Finds objects by name, with their masks where the bundle can decode those; see `masked`.
        PromptError if the model cannot.
        """
        picture, prompt = still(self.engines.read([image])), self.task("segment", objects)
        with self._turns.using():
            asked, sampling = [Exchange(prompt, 1)], Sampling.of(options)
            request = prepare(self.engines, asked, [picture], sampling)
        return self.masked(self._answer(request, None).finish().boxes, *picture.size)

    def masked(self, boxes: Sequence[Box], width: int, height: int) -> list[Box]:
        """The boxes with their masks, bool [height, width]; a box without the codes of a mask stays
        as it is, and so do all where the bundle has no mask decoder (`edgevlm export
        --segment-decoder`).
        """
        coded = [i for i, box in enumerate(boxes) if box.segment]
        found = list(boxes)
        decoder = self.engines.masks
        if coded and decoder:
            with self._turns.using():
                squares = decoder.decode(np.array([boxes[i].segment for i in coded]))
            for i, square in zip(coded, squares, strict=True):
                found[i] = replace(boxes[i], mask=in_picture(square, boxes[i], width, height))
        return found

    def score(
        self,
        prompt: str,
        continuations: Sequence[str],
        image: Images = None,
        *,
        with_end: bool = False,
    ) -> npt.NDArray[np.float64]:
        """Log-probability of each continuation after the prompt, float64 [len(continuations)].

        The sum over the continuation's tokens, computed from the full softmax in float64;
        `with_end` adds the end token, which makes answers of different length comparable. A bundle
        that was trimmed to languages scores among the tokens that remain. Raises PromptError for
        a continuation that is empty, too long, or has a token that no answer can have.

        >>> with edgevlm.load() as vlm:
        ...     shapes = vlm.score("answer en what shape is red?", ["circle", "star"], "photo.png")
        ...     print(shapes.argmax())
        0
        """
        _, asked, images = parted(prompt, image)
        with self._turns.whole():
            return scores(self.engines, asked, images, continuations, with_end=with_end)

    def image_embeddings(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """The picture's embeddings as the decoder reads them, float32 [tokens, n_embd], a copy.

        They are kept, and found, where answers keep theirs: in memory and on disk. Raises
        ImageError.

        >>> with edgevlm.load() as vlm:
        ...     print(vlm.image_embeddings("photo.png").shape)
        (64, 256)
        """
        # Where the engines take turns in memory, no answer's decoder may go.
        with self._turns.whole() if self.engines.apart else self._turns.using():
            picture = still(self.engines.read([image]))
            while True:
                try:
                    rows, _ = embeddings(self.engines, picture, self.manifest.image, Stopwatch())
                except Cancelled:
                    self._turns.check()  # otherwise an answer of another thread was meant
                else:
                    self.engines.cache.keep()
                    return rows.copy()

    def embed_image(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """The old name of `image_embeddings`; warns, and goes in 0.3."""
        warnings.warn(
            "VLM.embed_image is VLM.image_embeddings now; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.image_embeddings(image)

    def forget(self) -> None:
        """Drops what is remembered of pictures: the next answer computes everything anew.

        What lies on disk of pictures is not read any more by this model, and replaced as they are
        asked about again; `edgevlm gc` removes it.
        """
        with self._turns.whole():
            self.engines.forget()

    def cancel(self) -> None:
        """Ends the running answer within one token; may be called from any thread. Where none
        runs, or after `close`, nothing happens.
        """
        self._turns.cancel(self.engines.stop)

    def close(self) -> None:
        """Ends running answers and frees the engines; a second call does nothing."""
        self._turns.close(self.engines.stop, self.engines.close)

    def __enter__(self) -> Self:
        self._turns.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _only(device: str, engine: str) -> Devices:
    return Devices(Placement("auto", device, engine), Placement("auto", device, engine))
