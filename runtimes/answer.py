"""One answer as an iterator of pieces, drawn token by token."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from edgevlm.family import BoxReader
from edgevlm.image.plan import plan
from edgevlm.runtimes.engines import Cancelled, TextDecoder
from edgevlm.runtimes.logprobs import token_logprob
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.regions import found, line, rows
from edgevlm.runtimes.request import Request, embedded, input_blocks, joined, prefill
from edgevlm.runtimes.text import TextStream
from edgevlm.runtimes.turns import Turn, Turns
from edgevlm.types import (
    Box,
    FinishReason,
    Piece,
    Point,
    Reply,
    Timings,
    TokenCounts,
    TokenLogprob,
    shortened,
)


class Answer:
    """Iterate to stream it; `reply` is the whole answer so far, complete once the iterator ended.

    A cancelled answer ends early with finish_reason "cancelled". Breaking out of the loop is fine.
    The first piece waits until answers that other threads draw have ended, see VLM. Raises
    ModelClosed where the model was closed meanwhile, PromptError where it was asked something else.

    >>> with edgevlm.load() as vlm:
    ...     answer = vlm.stream("caption en", "photo.png")
    ...     for piece in answer:
    ...         if "blue" in answer.reply.text:
    ...             answer.cancel()
    ...     print(answer.reply.finish_reason)
    cancelled
    """

    def __init__(self, model: Engines, request: Request, turns: Turns, *, load_ms: float) -> None:
        self._turns, self._turn = turns, Turn(cancellable=True)
        draft = _Draft(model, request, self._turn, load_ms)
        self._draft: _Draft | _Given = draft
        # None of these knows the answer, so that it goes, and its turn with it, with the last
        # reference.
        self._pieces: Generator[Piece, None, None] | None = draft.write(model)
        self._stop: Callable[[], None] | None = model.stop
        weakref.finalize(self, turns.end, self._turn).atexit = False

    @classmethod
    def ended(cls, reply: Reply) -> Answer:
        """An answer that was given before: it has no pieces left."""
        answer = cls.__new__(cls)
        answer._pieces = answer._stop = None
        answer._draft = _Given(reply)
        return answer

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Piece:
        pieces, piece = self._pieces, None
        if pieces is None:
            raise StopIteration
        try:
            with self._turns.step(self._turn):
                piece = next(pieces, None)
        except Cancelled:
            pass  # It was still waiting for its turn.
        finally:
            if piece is None:
                # The engines may go, whoever keeps the answer.
                self._pieces = self._stop = None
                self._turns.end(self._turn)
        if piece:
            return piece
        if self._draft.broken_off:
            self._turns.check()
        raise StopIteration

    def __repr__(self) -> str:
        reply = self.reply
        state = reply.finish_reason if self._pieces is None else "open"
        return f"<Answer {shortened(reply.text)!r}, {state}, {reply.tokens.generated} tokens>"

    def _repr_html_(self) -> str:
        return self.reply._repr_html_()

    def finish(self) -> Reply:
        """Runs to the end and returns the whole answer."""
        for _ in self:
            pass
        return self.reply

    def cancel(self) -> None:
        """Ends this answer within one token; may be called from any thread."""
        if stop := self._stop:
            self._turns.cancel(stop, self._turn)

    @property
    def reply(self) -> Reply:
        """The answer as far as it has come."""
        return self._draft.reply


@dataclass(frozen=True)
class _Given:
    """An answer that was given before."""

    reply: Reply
    broken_off: bool = False


class _Draft:
    """The answer so far."""

    def __init__(self, model: Engines, request: Request, turn: Turn, load_ms: float) -> None:
        self._family = model.family
        self._request, self._turn = request, turn
        spec = model.manifest.answer
        self._constraint = form = request.sampling.constraint
        if form is None:
            stop = (*spec.stop_strings, *request.sampling.stop)
            self._text = TextStream(stop, strip=spec.strip, role=spec.role)
        else:
            # The grammar says where the answer ends, and what belongs to it.
            strip = spec.strip and form.kind != "grammar"
            self._text = TextStream(request.sampling.stop, strip=strip)
        self._tokens: list[int] = []
        self._found: list[Box | Point] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: FinishReason = "cancelled"
        self._timings = Timings(load_ms=load_ms)

    @property
    def broken_off(self) -> bool:
        """True where it was cancelled by something else than the caller."""
        return self._reason == "cancelled" and not self._turn.cancelled.is_set()

    @property
    def reply(self) -> Reply:
        """See Answer."""
        request = self._request
        boxes = [thing for thing in self._found if isinstance(thing, Box)]
        points = tuple(thing for thing in self._found if isinstance(thing, Point))
        size = request.sizes[0] if len(request.sizes) == 1 else None
        if self._family.boxes and size:
            boxes = self._boxes(self._family.boxes, size)
        counts = TokenCounts(
            image=request.n_image,
            text=request.n_text,
            cached=request.n_cached,
            generated=len(self._tokens) + sum(map(rows, self._found)),
            kept=request.n_kept,
            tiles=request.n_tiles,
        )
        return Reply(
            self._text.text,
            tuple(self._tokens),
            self._reason,
            counts,
            self._timings,
            tuple(boxes),
            tuple(self._logprobs),
            self._constraint,
            request.sources[0] if boxes or points else None,
            size,
            points,
        )

    def _boxes(self, read: BoxReader, size: tuple[int, int]) -> list[Box]:
        """The boxes in pixels of the picture; some models say them in those that they saw."""
        (spec,) = self._request.specs
        if spec.native is None:
            return read(self._text.text, *size)
        (width, height), (across, down) = size, plan(*size, spec).canvas
        # Multiplied first, so that an edge of the one is that of the other.
        return [
            replace(
                box,
                x0=box.x0 * width / across,
                y0=box.y0 * height / down,
                x1=box.x1 * width / across,
                y1=box.y1 * height / down,
            )
            for box in read(self._text.text, across, down)
        ]

    def write(self, model: Engines) -> Generator[Piece, None, None]:
        """The pieces of the answer, from the first stage on."""
        watch = self._request.watch
        try:
            if self._request.searches:
                yield from self._search(model)
            else:
                self._prefill(model)
                yield from self._draw(model)
        except Cancelled:
            pass
        finally:
            watch.ms["total_ms"] = watch.elapsed_ms
            self._timings = replace(self._timings, **watch.ms)
        if tail := self._text.push(b"", end=True):
            yield Piece(tail, (), watch.elapsed_ms)
        model.keep()  # the answer is there; nobody waits for this

    def _prefill(self, model: Engines) -> None:
        request = self._request
        self._stop_if_cancelled()
        blocks = input_blocks(model, request)
        self._stop_if_cancelled()
        with request.watch.timed("prefill_ms"):
            prefill(model, request, blocks, request.max_tokens)

    def _search(self, model: Engines) -> Generator[Piece, None, None]:
        """A piece for each object that the region model finds."""
        request, decoder, watch = self._request, model.decoder, self._request.watch
        spec, regions = model.manifest.regions, model.regions
        assert spec and regions  # the request has searches
        decoder.watch()
        embeddings, reasons = embedded(model, request), list[FinishReason]()
        for i, (search, segments) in enumerate(request.searches, 1):
            self._stop_if_cancelled()
            blocks = joined(model, replace(request, segments=segments), embeddings)
            with watch.timed("prefill_ms"):
                prefill(model, request, blocks, request.max_tokens)
            if not reasons:
                watch.ms["first_token_ms"] = watch.elapsed_ms
            things = found(search, spec, decoder, regions, request.max_tokens)
            while len(reasons) < i:
                self._stop_if_cancelled()
                try:
                    with watch.timed("decode_ms"):
                        thing = next(things)
                except StopIteration as end:
                    reasons.append(end.value)
                    continue
                self._found.append(thing)
                text = self._text.push(f"{line(thing)}\n".encode())
                yield Piece(text, (), watch.elapsed_ms)
        self._reason = "length" if "length" in reasons else "stop"

    def _draw(self, model: Engines) -> Generator[Piece, None, None]:
        request, decoder, watch = self._request, model.decoder, self._request.watch
        spec = model.manifest.answer
        stop_tokens = set(spec.stop_tokens)
        grammar = self._constraint.grammar_after(blank=spec.strip) if self._constraint else ""
        sampler = decoder.sampler(
            request.sampling, spec.penalized, grammar=grammar, stop=spec.stop_tokens
        )
        try:
            token = sampler.sample()
            watch.ms["first_token_ms"] = watch.elapsed_ms
            while token not in stop_tokens:
                self._stop_if_cancelled()
                logprobs = self._logprob(decoder, token)
                self._tokens.append(token)
                self._logprobs += logprobs
                piece = self._text.push(decoder.piece(token))
                ended = self._text.stopped or len(self._tokens) == request.max_tokens
                if ended:
                    self._reason = "stop" if self._text.stopped else "length"
                yield Piece(piece, (token,), watch.elapsed_ms, logprobs)
                if ended:
                    return
                self._stop_if_cancelled()
                with watch.timed("decode_ms"):
                    decoder.step(token)
                    if spec.never:
                        decoder.rule_out(spec.never)
                    token = sampler.sample()
            self._reason = "stop"
        finally:
            sampler.close()

    def _logprob(self, decoder: TextDecoder, token: int) -> tuple[TokenLogprob, ...]:
        """The log-probability of a token that was drawn from the last logits, if it is wanted."""
        n_top = self._request.sampling.logprobs
        return () if n_top is None else (token_logprob(decoder, token, n_top),)

    def _stop_if_cancelled(self) -> None:
        if self._turn.cancelled.is_set():
            raise Cancelled
