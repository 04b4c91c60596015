"""From a question and pictures to the decoder's rows, every stage timed.

Pictures become rows (encoder, projector, cache), the prompt becomes rows (tokenizer, embedding
table); both are joined in the order of the model's template.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgevlm.bundle import Manifest
from edgevlm.errors import ContextOverflow, PromptError
from edgevlm.family import Family
from edgevlm.image import RGB, ImageSource, preprocess, read_image
from edgevlm.prompt import (
    Begin,
    Picture,
    Segment,
    Text,
    Token,
    check_text,
    joined,
    segments,
    turn,
)
from edgevlm.runtimes.cache import RowCache, fingerprint
from edgevlm.runtimes.engines import TextDecoder, VisionEncoder
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.sampling import Sampling
from edgevlm.types import Reply

Float = npt.NDArray[np.float32]
History = Sequence[tuple[str, Reply]]


@dataclass(frozen=True)
class Bitmap:
    """A picture that was read, RGB uint8 [h, w, 3], its own copy."""

    rgb: RGB

    @cached_property
    def key(self) -> str:
        """What its embeddings are kept by; hashed when it is first needed."""
        return fingerprint(self.rgb)


Image = ImageSource | Bitmap


@dataclass(frozen=True)
class Parts:
    """What answers are made with: the model's manifest, its engines and the rows it remembers."""

    manifest: Manifest
    family: Family
    encoder: VisionEncoder
    decoder: TextDecoder
    cache: RowCache = field(default_factory=RowCache)

    def stop(self) -> None:
        """Ends the engines' running calls, from another thread; those raise Cancelled."""
        self.encoder.cancel()
        self.decoder.cancel()

    def close(self) -> None:
        """Frees the engines."""
        self.encoder.close()
        self.decoder.close()


class Stopwatch:
    """Milliseconds by the names of Timings' fields, and since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.ms: dict[str, float] = defaultdict(float)

    @property
    def elapsed_ms(self) -> float:
        """Time since this object was made."""
        return (time.perf_counter() - self._start) * 1e3

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        start = self.elapsed_ms
        try:
            yield
        finally:
            self.ms[name] += self.elapsed_ms - start


@dataclass
class Request:
    """A checked request. `parts` are, in order, token ids or the index of a picture.

    `pictures` are there until they are embeddings, `sizes` are their heights and widths. `n_image`
    and `n_text` count positions; `max_tokens` is what the context leaves for the answer or less;
    `n_cached` and `n_kept` are counted when the rows are made and read.
    """

    pictures: list[Bitmap]
    parts: list[list[int] | int]
    sampling: Sampling
    watch: Stopwatch
    n_image: int
    n_text: int
    max_tokens: int
    n_cached: int = 0
    n_kept: int = 0
    sizes: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = tuple((p.rgb.shape[0], p.rgb.shape[1]) for p in self.pictures)

    def shared(self, model: Parts) -> tuple[int, ...]:
        """Where blocks end that other questions begin with: the words before the first picture,
        and the last picture. None of a prefix whose rows all see the question.
        """
        if not self.sizes or model.manifest.decoder.attention == "prefix":
            return ()
        sizes = [
            model.manifest.image.tokens if isinstance(part, int) else len(part)
            for part in self.parts
        ]
        pictures = [i for i, part in enumerate(self.parts) if isinstance(part, int)]
        ends = (sum(sizes[: pictures[0]]), sum(sizes[: pictures[-1] + 1]))
        return tuple(end for end in ends if end)


def prefill(model: Parts, request: Request, rows: Float, room: int) -> None:
    """The decoder reads the input's rows; state that it kept counts as cached."""
    request.n_kept = interruptible(
        lambda: model.decoder.prefill(
            rows,
            bidirectional=model.manifest.decoder.attention == "prefix",
            room=room,
            shared=request.shared(model),
        ),
        model.decoder.cancel,
    )
    request.n_cached = max(request.n_cached, request.n_kept)


def prepare(
    model: Parts,
    prompt: str,
    images: Sequence[Image],
    sampling: Sampling,
    history: History = (),
) -> Request:
    """Reads the pictures, tokenizes the prompt and checks that all of it fits.

    `history` holds the questions before it with their answers. Raises ImageError,
    PromptError or ContextOverflow.
    """
    watch = Stopwatch()
    spec = model.manifest
    check_text(prompt)
    if len(images) > spec.image.max_pictures:
        raise PromptError(
            f"{len(images)} pictures in one request; this model takes {spec.image.max_pictures}"
        )
    with watch.timed("image_decode_ms"):
        pictures = read(images)
    parts = _conversation(model, prompt, history, len(pictures))
    n_image = len(pictures) * spec.image.tokens
    n_text = sum(len(p) for p in parts if isinstance(p, list))
    context = spec.decoder.context_length
    if n_image + n_text + 1 > context:
        raise ContextOverflow(n_image, n_text, 1, context)
    wanted = sampling.max_tokens or spec.answer.max_tokens
    room = min(wanted, context - n_image - n_text)
    return Request(pictures, parts, sampling, watch, n_image, n_text, room)


def prepare_last(
    model: Parts,
    prompt: str,
    images: Sequence[Image],
    sampling: Sampling,
    history: History,
) -> tuple[Request, int]:
    """The last question of a conversation, with as much before it as fits, and how many of the
    oldest questions were left out.

    None are as long as the answer has room for the tokens it may have, or for a quarter of the
    context. Where it has not, so many go that half the context is free: each time some go the
    decoder has to read the others again.
    """
    context = model.manifest.decoder.context_length
    room = min(sampling.max_tokens or model.manifest.answer.max_tokens, context // 4)
    pictures = read(images)
    for left_out in range(len(history)):
        try:
            request = prepare(model, prompt, pictures, sampling, history[left_out:])
        except ContextOverflow:
            pass
        else:
            if context - request.n_image - request.n_text >= room:
                return request, left_out
        room = context // 2
    return prepare(model, prompt, pictures, sampling), len(history)


def read(images: Sequence[Image]) -> list[Bitmap]:
    """The pictures, each read if it was not; raises ImageError."""
    return [i if isinstance(i, Bitmap) else Bitmap(read_image(i)) for i in images]


def _conversation(
    model: Parts, prompt: str, history: History, n_pictures: int
) -> list[list[int] | int]:
    spec, decoder = model.manifest.prompt, model.decoder
    prompts = [*(question for question, _ in history), prompt]
    said = segments(spec, prompts[0], n_pictures)
    following = [turn(spec, question) for question in prompts[1:]]
    if spec.joined:
        for (_, answer), words in zip(history, following, strict=True):
            said += [Text(answer.text), *words]
        return [_part(decoder, s) for s in joined(said)]
    parts = [_part(decoder, s) for s in said]
    for (_, answer), words in zip(history, following, strict=True):
        parts += [list(answer.token_ids), *(_part(decoder, s) for s in words)]
    return parts


def _part(decoder: TextDecoder, segment: Segment) -> list[int] | int:
    if isinstance(segment, Picture):
        return segment.index
    if isinstance(segment, Token):
        return [segment.id]
    return [decoder.bos] if isinstance(segment, Begin) else decoder.tokenize(segment.text)


def input_rows(model: Parts, request: Request) -> Float:
    """The decoder's input, float32 [n_image + n_text, n_embd]. Runs the encoder where needed, and
    lets the pictures go.
    """
    blocks = []
    for part in request.parts:
        if isinstance(part, int):
            blocks.append(_picture_rows(model, request, request.pictures[part]))
        elif part:
            with request.watch.timed("prefill_ms"):
                blocks.append(model.decoder.embed(part))
    request.pictures.clear()
    return np.concatenate(blocks)


def _picture_rows(model: Parts, request: Request, picture: Bitmap) -> Float:
    with request.watch.timed("preprocess_ms"):
        key = picture.key
    cached = model.cache.get(key)
    if cached is not None:
        request.n_cached += len(cached)
        return cached
    embedded = encode(model, picture.rgb, request.watch)
    model.cache.put(key, embedded)
    return embedded


def encode(model: Parts, picture: RGB, watch: Stopwatch) -> Float:
    """RGB uint8 [h, w, 3] -> embeddings float32 [tokens, n_embd]."""
    with watch.timed("preprocess_ms"):
        pixels = preprocess(picture, model.manifest.image)[None]
    stop = model.encoder.cancel
    with watch.timed("vision_ms"):
        features = interruptible(lambda: model.encoder.features(pixels), stop)
    with watch.timed("projector_ms"):
        embedded: Float = interruptible(lambda: model.encoder.project(features), stop)[0]
        return embedded
