"""Chat: questions about the same picture, one after the other. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgevlm import notebook
from edgevlm.errors import PromptError
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.asynchronous import AsyncAnswer
from edgevlm.runtimes.messages import Images, several
from edgevlm.runtimes.request import prepare_last
from edgevlm.sampling import Sampling, SamplingOptions
from edgevlm.types import Devices, Progress, Reply

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edgevlm.runtimes.session import VLM


class Chat:
    """Questions about the same picture, which is read and encoded once.

    Models that were trained on conversations are told what was asked and answered before, as much
    as fits their context: the oldest questions are left out first, `left_out` counts them. The
    others answer each question on its own. `turns` keeps all of them for the reader. `image` may be
    set to another picture at any time, which is read then; the model starts afresh.

    >>> with edgevlm.load() as vlm, vlm.chat("photo.png") as chat:
    ...     for question in ("answer en what shape is red?", "answer en what shape is blue?"):
    ...         print(chat.ask(question), chat.reply.tokens.cached)
    circle 0
    square 64
    """

    def __init__(self, vlm: VLM, image: Images = None) -> None:
        self._vlm = vlm
        self._first = 0
        self.turns: list[tuple[str, Answer]] = []
        self.left_out = 0
        self.image = image

    def __repr__(self) -> str:
        name, pictures = self._vlm.manifest.name, len(self._pictures)
        return f"<Chat with {name}: {pictures} pictures, {len(self.turns)} questions>"

    def _repr_html_(self) -> str:
        turns = [(question, answer.reply) for question, answer in self.turns]
        return notebook.conversation([bitmap.picture.rgb for bitmap in self._pictures], turns)

    @property
    def devices(self) -> Devices:
        """Placement of encoder and decoder."""
        return self._vlm.devices

    @property
    def image(self) -> Images:
        """The source of the picture that the questions are about."""
        return self._image

    @image.setter
    def image(self, image: Images) -> None:
        self._pictures = self._vlm.engines.read(several(image))
        self._image, self._first, self.left_out = image, len(self.turns), 0

    def stream(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Starts the next answer; see VLM.stream."""
        vlm, sampling = self._vlm, Sampling.of(options)
        turns = self.turns[self._first :] if vlm.manifest.prompt.turn else []
        history = [(question, answer.reply) for question, answer in turns]
        with vlm._turns.using():
            request, n = prepare_last(vlm.engines, prompt, self._pictures, sampling, history)
        self._first, self.left_out = self._first + n, self.left_out + n
        answer = vlm._answer(request, progress)
        self.turns.append((prompt, answer))
        return answer

    def ask(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole next answer."""
        return self.stream(prompt, progress=progress, **options).finish()

    def astream(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncAnswer:
        """The next answer for `async for`, one at a time; see VLM.astream."""
        return AsyncAnswer(lambda: self.stream(prompt, progress=progress, **options))

    async def aask(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole next answer, without blocking the event loop."""
        return await self.astream(prompt, progress=progress, **options).finish()

    @property
    def reply(self) -> Reply:
        """The last answer as far as it has come. PromptError before the first."""
        if not self.turns:
            raise PromptError("nothing was asked in this chat yet")
        return self.turns[-1][1].reply

    def clear(self) -> None:
        """Forgets the turns; the picture stays."""
        self.turns.clear()
        self._first = self.left_out = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.turns:
            self.turns[-1][1].cancel()
