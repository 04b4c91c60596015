"""DualEncoder: pictures and texts become rows of one space. Knows no engine."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgevlm.errors import ImageError, ModelClosed, PromptError
from edgevlm.image import ImageSource, Pixels, preprocess, read_picture
from edgevlm.manifest import Manifest
from edgevlm.progress import Stage
from edgevlm.runtimes.engines import Cancelled, Float
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.specs import TextSpec
from edgevlm.texts import Ids
from edgevlm.types import LabelScore, Placement, Progress

if TYPE_CHECKING:
    from typing_extensions import Self

# More at once are not faster on processors, and their activations take memory.
BATCH = 4
# Batches of pictures that are read while another one is encoded.
_AHEAD = 2
_READERS = 2

Labels = Sequence[str]
T = TypeVar("T")


class RowEncoder(Protocol):
    """One side's graph: pixels or token ids -> unit rows float32 [n, width]."""

    def embed(self, batch: npt.NDArray[np.generic]) -> Float:
        """The rows of a batch."""

    def cancel(self) -> None:
        """Ends a running call from another thread; that call raises Cancelled."""

    def close(self) -> None:
        """Frees the engine."""


@dataclass(frozen=True)
class Sides:
    """The engines of a dual encoder, each opened when it is first needed."""

    vision: Callable[[], tuple[RowEncoder, Placement]]
    text: Callable[[], tuple[RowEncoder, Callable[[Sequence[str]], Ids]]]


class DualEncoder:
    """A loaded CLIP or SigLIP. `edgevlm.load_dual` makes one; close it or use it in a `with`.

    Rows have length 1, so that their product is the cosine. Each side is opened with its first
    use: who searches with words alone never loads the vision tower. Threads may share it. After
    `close`, and in a process that was forked after the first use, it raises ModelClosed.
    """

    def __init__(self, manifest: Manifest, sides: Sides) -> None:
        assert manifest.text
        self.manifest = manifest
        self._sides, self._lock = sides, threading.Lock()
        self._vision: tuple[RowEncoder, Placement] | None = None
        self._text: tuple[RowEncoder, Callable[[Sequence[str]], Ids]] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<DualEncoder {self.manifest.name}{': closed' if self._closed else ''}>"

    @property
    def spec(self) -> TextSpec:
        """The width of rows, the numbers of a score, and how texts are read."""
        assert self.manifest.text
        return self.manifest.text

    @property
    def placement(self) -> Placement:
        """The device of the vision tower; the text tower runs on the processor."""
        return self._seeing()[1]

    def pixels(self, image: ImageSource) -> Pixels:
        """A picture as the vision tower sees it, float32 [3, size, size]; raises ImageError."""
        return preprocess(read_picture(image), self.manifest.image)

    def embed_pixels(self, pixels: Float) -> Float:
        """Pixels float32 [n, 3, size, size] -> unit rows float32 [n, d]."""
        encoder, _ = self._seeing()
        return self._run(encoder, pixels)

    def embed_image(self, image: ImageSource) -> Float:
        """The picture's row, float32 [d]: a path, URL, bytes, PIL image or array. Raises
        ImageError.
        """
        row: Float = self.embed_pixels(self.pixels(image)[None])[0]
        return row

    def embed_images(
        self,
        images: Iterable[ImageSource],
        *,
        batch: int = BATCH,
        progress: Callable[[Progress], None] | None = None,
    ) -> Float:
        """The pictures' rows, float32 [n, d], `batch` at a time; others are read meanwhile.

        `progress` is told of every picture. Raises ImageError for the first that cannot be read.
        """
        sources = [("", image) for image in images]
        stage = Stage(progress, "pictures", len(sources), "pictures")
        rows = np.zeros((len(sources), self.spec.width), np.float32)
        for i, (_, row) in enumerate(self.rows(sources, batch=batch)):
            if isinstance(row, ImageError):
                raise row
            rows[i] = row
            stage.advance(1)
        return rows

    def rows(
        self, images: Iterable[tuple[T, ImageSource]], *, batch: int = BATCH
    ) -> Iterator[tuple[T, Float | ImageError]]:
        """Each picture's key and its row [d], or the reason why it cannot be read, in their order.

        Pictures are read in other threads while a batch is encoded; at most three batches of them
        are in memory, however many there are.
        """
        if batch < 1:
            raise PromptError("batch must be at least 1")
        with ThreadPoolExecutor(_READERS, "pictures") as pool:
            reading = deque[list[tuple[T, Future[Pixels]]]]()
            try:
                for some in _batches(images, batch):
                    reading.append([(key, pool.submit(self.pixels, image)) for key, image in some])
                    if len(reading) > _AHEAD:
                        yield from self._rows(reading.popleft())
                while reading:
                    yield from self._rows(reading.popleft())
            finally:
                for waiting in reading:
                    for _, future in waiting:
                        future.cancel()

    def _rows(self, reading: list[tuple[T, Future[Pixels]]]) -> list[tuple[T, Float | ImageError]]:
        """The rows of a batch whose pictures are being read."""
        found = [(key, _result(future)) for key, future in reading]
        sound = [pixels for _, pixels in found if not isinstance(pixels, ImageError)]
        rows = iter(self.embed_pixels(np.stack(sound)) if sound else ())
        return [
            (key, pixels if isinstance(pixels, ImageError) else next(rows)) for key, pixels in found
        ]

    def embed_text(
        self,
        texts: str | Sequence[str],
        *,
        batch: int = 32,
        progress: Callable[[Progress], None] | None = None,
    ) -> Float:
        """The texts' rows, float32 [n, d]; one text is a list of one.

        What does not fit the tower is cut at its end; an empty text has a row, too. `progress` is
        told of every batch. Raises PromptError for what is not a text.
        """
        if batch < 1:
            raise PromptError("batch must be at least 1")
        given = [texts] if isinstance(texts, str) else list(texts)
        stage = Stage(progress, "texts", len(given), "texts")
        encoder, tokens = self._reading()
        rows = [np.zeros((0, self.spec.width), np.float32)]
        for some in _batches(given, batch):
            rows.append(self._run(encoder, tokens(some)))
            stage.advance(len(some))
        return np.concatenate(rows)

    def count_tokens(self, texts: str | Sequence[str]) -> int:
        """Number of positions that the text tower reads of these texts, padding that it sees among
        them. Raises PromptError.
        """
        given = [texts] if isinstance(texts, str) else texts
        _, tokens = self._reading()
        return sum(tokens([text]).shape[1] for text in given)

    def embed_labels(self, labels: Labels, template: str | Labels | None = None) -> Float:
        """The labels' rows, float32 [n, d], each put into a template in place of `{}`; of several
        templates a label's row is the mean of its texts'. None is the model's own template.

        Raises PromptError for no labels, and for a template without `{}`.
        """
        if isinstance(labels, str) or not labels:
            raise PromptError("labels must be a list of at least one text")
        given = self.spec.template if template is None else template
        templates = [given] if isinstance(given, str) else list(given)
        if not templates:
            raise PromptError("name at least one template, or None for the model's own")
        for each in templates:
            if "{}" not in each:
                raise PromptError(f"the template {each!r} has no {{}} for the label")
        texts = [each.replace("{}", _text(label)) for label in labels for each in templates]
        rows = self.embed_text(texts).reshape(len(labels), len(templates), -1).mean(1)
        unit: Float = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    def classify(
        self, image: ImageSource, labels: Labels, template: str | Labels | None = None
    ) -> list[LabelScore]:
        """The labels with their scores for a picture, the best first; see `embed_labels`.

        Of CLIP the scores share 1; of SigLIP each is the probability of that label alone, so that
        all may be near 0. Raises ImageError, PromptError.
        """
        rows = self.embed_labels(labels, template)
        return self.scored(self.embed_image(image), labels, rows)

    def scored(self, row: Float, labels: Labels, rows: Float) -> list[LabelScore]:
        """The labels with their scores for a picture's row [d], the best first; `rows` are the
        labels', from `embed_labels`.
        """
        cosines = rows.astype(np.float64) @ row.astype(np.float64)
        scores = self.scores(cosines)
        found = [
            LabelScore(label, float(score), float(cosine))
            for label, score, cosine in zip(labels, scores, cosines, strict=True)
        ]
        return sorted(found, key=lambda s: -s.score)

    def scores(self, cosines: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Cosines of one picture and several texts -> what the model says of them, 0 to 1."""
        logits = self.spec.scale * np.asarray(cosines, np.float64) + self.spec.bias
        if self.spec.sigmoid:
            return np.exp(-np.logaddexp(0, -logits))
        shifted = np.exp(logits - logits.max(initial=-np.inf))
        shares: npt.NDArray[np.float64] = shifted / shifted.sum()
        return shares

    def close(self) -> None:
        """Frees the engines; a second call does nothing."""
        with self._lock:
            self._closed = True
            for side in (self._vision, self._text):
                if side:
                    side[0].close()
            self._vision = self._text = None

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise ModelClosed(f"{self.manifest.name} is closed; load it again")

    def _seeing(self) -> tuple[RowEncoder, Placement]:
        with self._lock:
            self._check()
            self._vision = self._vision or self._sides.vision()
            return self._vision

    def _reading(self) -> tuple[RowEncoder, Callable[[Sequence[str]], Ids]]:
        with self._lock:
            self._check()
            self._text = self._text or self._sides.text()
            return self._text

    def _run(self, encoder: RowEncoder, batch: npt.NDArray[np.generic]) -> Float:
        if not len(batch):
            return np.zeros((0, self.spec.width), np.float32)
        try:
            return interruptible(lambda: encoder.embed(batch), encoder.cancel)
        except Cancelled:
            self._check()
            raise


def _text(label: object) -> str:
    if not isinstance(label, str):
        raise PromptError(f"a {type(label).__name__} is not a label; pass str")
    return label


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, `size` at a time, taken as they are needed."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _result(future: Future[Pixels]) -> Pixels | ImageError:
    try:
        return future.result()
    except ImageError as e:
        return e
