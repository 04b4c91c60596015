"""Answers for asyncio: drawn in a thread of their own, awaited in the event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgevlm.errors import PromptError
from edgevlm.runtimes.answer import Answer
from edgevlm.types import Piece, Reply

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncAnswer:
    """An answer that `astream` started: `async for` gives its pieces, `finish` the whole.

    It begins with the first piece that is awaited; what `stream` would raise is raised there. The
    model goes on while the caller does other things. `aclose`, the end of an `async with` block,
    and a task that is cancelled or runs out of time while it waits end the answer within a token.

    >>> import asyncio
    >>> async def main() -> None:
    ...     with edgevlm.load() as vlm:
    ...         async with vlm.astream("caption en", "photo.png") as answer:
    ...             async for piece in answer:
    ...                 print(piece.text, end="")
    >>> asyncio.run(main())
    a red circle, a blue square, a yellow triangle and a green star
    """

    def __init__(self, start: Callable[[], Answer]) -> None:
        self._start = start
        self._drawing: _Drawing | None = None
        self._over = False

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        if self._drawing is None:
            # A thread each: a pool's could all be waiting for their turns, and none be left to go
            # on with the answer whose turn it is.
            self._drawing = _Drawing(self._start)
            weakref.finalize(self, self._drawing.cancel).atexit = False
            self._drawing.begin()
        try:
            piece = await self._drawing.pieces.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(piece, Piece):
            return piece
        self._over = True
        if piece is None:
            raise StopAsyncIteration
        raise piece

    def __repr__(self) -> str:
        answer = self._drawing.answer if self._drawing else None
        return f"<AsyncAnswer of {answer!r}>" if answer else "<AsyncAnswer, not begun>"

    async def finish(self) -> Reply:
        """Waits for the end and returns the whole answer."""
        async for _ in self:
            pass
        return self.reply

    def cancel(self) -> None:
        """Ends this answer within one token; may be called from any thread."""
        if self._drawing:
            self._drawing.cancel()

    async def aclose(self) -> None:
        """Ends this answer and waits until the model does no more for it."""
        self.cancel()
        if self._drawing and self._drawing.answer:
            while not self._over:
                self._over = not isinstance(await self._drawing.pieces.get(), Piece)
        self._over = True

    @property
    def reply(self) -> Reply:
        """The answer as far as it has come; raises PromptError before it has begun."""
        if self._drawing is None or self._drawing.answer is None:
            raise PromptError("this answer has not begun; iterate over it or await finish()")
        return self._drawing.answer.reply

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Drawing:
    """The thread that draws an answer, and what it has drawn: pieces, then None or an error. It
    does not know the AsyncAnswer, so that one that nobody keeps ends it.
    """

    def __init__(self, start: Callable[[], Answer]) -> None:
        self.pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.answer: Answer | None = None
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    def begin(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._draw, name="edgevlm answer", daemon=True).start()

    def cancel(self) -> None:
        """Ends it within one token, or once the pictures are read."""
        self._cancelled.set()
        if self.answer:
            self.answer.cancel()

    def _draw(self) -> None:
        end: BaseException | None = None
        try:
            self.answer = self._start()
            if self._cancelled.is_set():
                self.answer.cancel()
            for piece in self.answer:
                self._put(piece)
        except BaseException as e:
            end = e
        self._put(end)

    def _put(self, piece: Piece | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # The event loop is closed: nobody waits any more.
            self.cancel()
