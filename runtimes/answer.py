"""One answer as an iterator of pieces, drawn token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

from edgevlm.errors import PromptError
from edgevlm.runtimes.engines import Cancelled
from edgevlm.runtimes.request import Parts, Request, input_rows, prefill
from edgevlm.runtimes.text import TextStream
from edgevlm.types import FinishReason, Piece, Reply, Timings, TokenCounts


class Answer:
    """Iterate to stream it; `reply` is the whole answer so far, complete once the iterator ended.

    A cancelled answer ends early with finish_reason "cancelled". Breaking out of the loop is fine.
    """

    def __init__(
        self, model: Parts, request: Request, *, load_ms: float, superseded: Callable[[], bool]
    ) -> None:
        self._model = model
        self._request = request
        self._superseded = superseded
        spec = model.manifest.answer
        stop = (*spec.stop_strings, *request.sampling.stop)
        self._text = TextStream(stop, strip=spec.strip, role=spec.role)
        self._tokens: list[int] = []
        self._reason: FinishReason = "cancelled"
        self._timings = Timings(load_ms=load_ms)
        self._pieces = self._generate()

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def finish(self) -> Reply:
        """Runs to the end and returns the whole answer."""
        for _ in self:
            pass
        return self.reply

    @property
    def reply(self) -> Reply:
        """The answer as far as it has come."""
        request, family = self._request, self._model.family
        boxes = []
        if family.boxes and len(request.pictures) == 1:
            height, width = request.pictures[0].shape[:2]
            boxes = family.boxes(self._text.text, width, height)
        counts = TokenCounts(
            request.n_image, request.n_text, request.n_cached, len(self._tokens), request.n_kept
        )
        return Reply(
            self._text.text, tuple(self._tokens), self._reason, counts, self._timings, tuple(boxes)
        )

    def _generate(self) -> Generator[Piece, None, None]:
        watch = self._request.watch
        try:
            self._prefill()
            yield from self._draw()
        except Cancelled:
            pass
        finally:
            watch.ms["total_ms"] = watch.elapsed_ms
            self._timings = replace(self._timings, **watch.ms)
        if tail := self._text.push(b"", end=True):
            yield Piece(tail, (), watch.elapsed_ms)

    def _prefill(self) -> None:
        model, request = self._model, self._request
        prefix = input_rows(model, request)
        self._stop_if_cancelled()
        with request.watch.timed("prefill_ms"):
            prefill(model, request, prefix, request.max_tokens)

    def _draw(self) -> Generator[Piece, None, None]:
        request, decoder, watch = self._request, self._model.decoder, self._request.watch
        stop_tokens = set(self._model.manifest.answer.stop_tokens)
        sampler = decoder.sampler(request.sampling, self._model.manifest.answer.penalized)
        try:
            token = sampler.sample()
            watch.ms["first_token_ms"] = watch.elapsed_ms
            while token not in stop_tokens:
                self._stop_if_cancelled()
                self._tokens.append(token)
                piece = self._text.push(decoder.piece(token))
                ended = self._text.stopped or len(self._tokens) == request.max_tokens
                if ended:
                    self._reason = "stop" if self._text.stopped else "length"
                yield Piece(piece, (token,), watch.elapsed_ms)
                if ended:
                    return
                self._stop_if_cancelled()
                with watch.timed("decode_ms"):
                    decoder.step(token)
                    token = sampler.sample()
            self._reason = "stop"
        finally:
            sampler.close()

    def _stop_if_cancelled(self) -> None:
        if self._superseded():
            raise PromptError(
                "this answer cannot go on: the model was asked something else; "
                "finish one answer before the next or load the model twice"
            )
        if self._model.cancelled.is_set():
            raise Cancelled
