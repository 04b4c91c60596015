"""A loaded model: its engines and what it remembers, and a watch for what they do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgevlm.errors import ContextOverflow, PromptError
from edgevlm.family import Family
from edgevlm.manifest import Manifest
from edgevlm.prompt import normalized
from edgevlm.runtimes.bitmaps import Bitmap, Shown, ShownSource, read
from edgevlm.runtimes.budget import Budget
from edgevlm.runtimes.cache import EmbeddingCache
from edgevlm.runtimes.engines import MaskDecoder, RegionModel, TextDecoder, VisionEncoder
from edgevlm.runtimes.prefixes import PrefixCache
from edgevlm.specs import ImageSpec

Float = npt.NDArray[np.float32]

# Characters from which on a text is counted in blocks before it is tokenized whole: SentencePiece's
# merging in llama.cpp takes the square of a text's length, 13 s for 200,000 emoji.
_LONG_TEXT, _TEXT_BLOCK = 32_000, 4_000


@dataclass(frozen=True)
class Engines:
    """A loaded model: its manifest, its encoder and decoder, and what it remembers: embeddings and,
    on disk, prefixes.

    `text` is the decoder, None in a bundle that has none. `newline` is the row float32 [n_embd]
    that ends the lines of a picture, where the model has one, `masks` the mask decoder, where the
    bundle has one, `regions` the region model. `read` reads pictures. `budget` says whether both
    engines are there at a time.
    """

    manifest: Manifest
    family: Family
    encoder: VisionEncoder
    text: TextDecoder | None
    newline: Float | None = None
    masks: MaskDecoder | None = None
    regions: RegionModel | None = None
    cache: EmbeddingCache = field(default_factory=EmbeddingCache)
    prefixes: PrefixCache | None = None
    read: Callable[[Sequence[ShownSource]], list[Shown]] = read
    budget: Budget | None = None

    @property
    def decoder(self) -> TextDecoder:
        """The decoder; raises PromptError where there is none."""
        if self.text is None:
            raise PromptError("this bundle has no decoder: it can embed pictures, not answer")
        return self.text

    def known(self, picture: Bitmap, spec: ImageSpec) -> Float | None:
        """The embeddings float32 [rows, n_embd] of a picture if they are remembered."""
        shape = (picture.plan(spec).rows, self.manifest.decoder.n_embd)
        return self.cache.get(picture.key(spec), shape)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as the model's own tokenizer gives them; raises ContextOverflow for one
        that is far longer than the context.
        """
        text = normalized(text, self.manifest.prompt)
        self._check_length(text)
        return self.decoder.tokenize(text)

    def _check_length(self, text: str) -> None:
        n, context = 0, self.manifest.decoder.context_length
        for start in range(0, len(text) if len(text) > _LONG_TEXT else 0, _TEXT_BLOCK):
            n += len(self.decoder.tokenize(text[start : start + _TEXT_BLOCK]))
            # What a cut through a word adds is far less than that.
            if n > 2 * context:
                raise ContextOverflow(0, n, 1, context)

    def stop(self) -> None:
        """Ends the engines' running calls, from another thread; those raise Cancelled."""
        self.encoder.cancel()
        if self.text:
            self.text.cancel()

    @property
    def apart(self) -> bool:
        """True where the engines take turns in memory."""
        return self.budget is not None and self.budget.apart

    def turn_to(self, engine: VisionEncoder | TextDecoder) -> None:
        """Frees the other engine's weights where memory has no room for both."""
        for other in (self.encoder, self.text):
            if self.apart and other and other is not engine:
                other.release()

    def keep(self) -> None:
        """Writes what was computed of pictures to disk, where that is wanted."""
        self.cache.keep()
        if self.prefixes:
            self.prefixes.keep(self.decoder)

    def forget(self) -> None:
        """Forgets every picture and question, and reads no more of what is on disk."""
        self.cache.clear()
        if self.prefixes:
            self.prefixes.forget()
        if self.text:
            self.text.clear()

    def close(self) -> None:
        """Frees the engines."""
        self.cache.clear()
        self.encoder.close()
        for head in (self.masks, self.regions):
            if head:
                head.close()
        if self.text:
            self.text.close()


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
