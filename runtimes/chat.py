"""Chat: questions about pictures, one after the other. Knows no engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgevlm import notebook
from edgevlm.errors import PromptError
from edgevlm.image import Picture
from edgevlm.runtimes import saved_chat
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.asynchronous import AsyncAnswer
from edgevlm.runtimes.bitmaps import Bitmap, Clip, Shown, is_film
from edgevlm.runtimes.messages import Images, several
from edgevlm.runtimes.past import Past, prepare_last
from edgevlm.runtimes.request import check_system
from edgevlm.runtimes.views import check_film
from edgevlm.sampling import Sampling, SamplingOptions
from edgevlm.types import Devices, Progress, Reply
from edgevlm.video import Video

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edgevlm.runtimes.session import VLM


@dataclass(frozen=True)
class _Turn:
    """A question, the pictures and videos that came with it, and its answer."""

    question: str
    pictures: list[Shown]
    answer: Answer


@dataclass
class _State:
    """A conversation: what the model is told of begins at the turn `first`; the pictures and videos
    `coming` are shown with the next question.
    """

    turns: list[_Turn]
    coming: list[Shown]
    first: int = 0
    left_out: int = 0

    def copy(self) -> _State:
        return replace(self, turns=[*self.turns], coming=[*self.coming])


class Chat:
    """Questions about the same pictures or videos, which are read and encoded once.

    Models that were trained on conversations are told what was asked and answered before, as much
    as fits their context: the oldest questions are left out first, `left_out` counts them, and the
    pictures that came with them, but never those that were shown last. The others answer each
    question on its own. `image` may be set to other pictures at any time, which are read then; the
    model starts afresh. `add_image` shows further ones in the middle of a conversation, where the
    model `takes_more_images`. `system` is the system message, None for the template's own words; it
    may be set, too.

    >>> with edgevlm.load() as vlm, vlm.chat("photo.png") as chat:
    ...     for question in ("answer en what shape is red?", "answer en what shape is blue?"):
    ...         print(chat.ask(question), chat.reply.tokens.cached)
    circle 0
    square 64
    """

    def __init__(self, vlm: VLM, image: Images = None, system: str | None = None) -> None:
        self._vlm = vlm
        self._state = _State([], [])
        self.system = system
        self.image = image

    def __repr__(self) -> str:
        name, pictures, videos = self._vlm.manifest.name, len(self.pictures), len(self.videos)
        shown = f"{pictures} pictures, " + (f"{videos} videos, " if videos else "")
        return f"<Chat with {name}: {shown}{len(self.turns)} questions>"

    def _repr_html_(self) -> str:
        turns = [(question, answer.reply) for question, answer in self.turns]
        shown = [picture.rgb for picture in self.pictures]
        return notebook.conversation([*shown, *(v.frames[0] for v in self.videos)], turns)

    @property
    def devices(self) -> Devices:
        """Placement of encoder and decoder."""
        return self._vlm.devices

    @property
    def turns(self) -> list[tuple[str, Answer]]:
        """All questions and their answers, for the reader, whatever the model is told of them."""
        return [(turn.question, turn.answer) for turn in self._state.turns]

    @property
    def left_out(self) -> int:
        """The number of the oldest questions that the model is not told any more."""
        return self._state.left_out

    @property
    def system(self) -> str | None:
        """The system message; raises PromptError where the model's template knows none."""
        return self._system

    @system.setter
    def system(self, system: str | None) -> None:
        check_system(self._vlm.manifest, system)
        self._system = system

    @property
    def image(self) -> Images:
        """The sources of the pictures, and the videos, that the next question is about: None, one,
        or a list.
        """
        return _sources(self._shown)

    @image.setter
    def image(self, image: Images) -> None:
        coming = self._read(image, alone=True)
        # Nobody is told of their pictures again, which may be large.
        turns = [replace(turn, pictures=[]) for turn in self._state.turns]
        self._state = _State(turns, coming, len(turns))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures that the next question is about, in the order in which they were shown."""
        return tuple(one.picture for one in self._shown if isinstance(one, Bitmap))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos that the next question is about, in the order in which they were shown."""
        return tuple(one.video for one in self._shown if isinstance(one, Clip))

    @property
    def _shown(self) -> list[Shown]:
        shown = [one for turn in self._told for one in turn.pictures]
        return [*shown, *self._state.coming]

    def _read(self, image: Images, *, alone: bool) -> list[Shown]:
        given = several(image)
        if any(map(is_film, given)):
            check_film(self._vlm.manifest, alone=alone and len(given) == 1)
        return self._vlm.engines.read(given)

    @property
    def _told(self) -> list[_Turn]:
        """The turns that the model is told of with the next question."""
        turns = self._state.turns[self._state.first :]
        return turns if self._vlm.manifest.prompt.turn else []

    @property
    def begun(self) -> bool:
        """True where the model is told of questions before the next one."""
        return bool(self._told)

    @property
    def takes_more_images(self) -> bool:
        """True for a model that takes pictures in any question of a conversation."""
        spec = self._vlm.manifest
        return "{image}" in spec.prompt.turn and spec.image.max_pictures > 1

    @property
    def next_image(self) -> Images:
        """The sources of the pictures, and the videos, that come with the next question: None, one,
        or a list. May be set to others, or to None, which takes them back; what was shown and said
        before stays. Raises as `add_image` does.
        """
        return _sources(self._state.coming)

    @next_image.setter
    def next_image(self, image: Images) -> None:
        before = [one for turn in self._told for one in turn.pictures]
        self._state.coming = self._read_next(image, alone=not before)

    def add_image(self, image: Images) -> None:
        """Shows further pictures or a video with the next question; what was shown and said before
        stays.

        Raises ImageError, or PromptError where questions were asked and the model takes pictures
        with the first one only.
        """
        self._state.coming += self._read_next(image, alone=not self._shown)

    def _read_next(self, image: Images, *, alone: bool) -> list[Shown]:
        if self.begun and not self.takes_more_images:
            raise PromptError(
                f"{self._vlm.manifest.name} takes pictures with the first question only; set "
                "`image`, which begins a new conversation"
            )
        return self._read(image, alone=alone)

    def stream(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Starts the next answer; see VLM.stream."""
        vlm, sampling, told = self._vlm, Sampling.of(options), self._told
        past = [Past(t.question, t.pictures, t.answer.reply) for t in told]
        coming = self._state.coming
        with vlm._turns.using():
            request, n = prepare_last(
                vlm.engines, prompt, coming, sampling, past, system=self._system
            )
        answer = vlm._answer(request, progress)
        state = self._state
        if vlm.manifest.prompt.turn:
            coming = self._leave_out(n)
            state.coming = []
        state.turns.append(_Turn(prompt, coming, answer))
        return answer

    def _leave_out(self, n: int) -> list[Shown]:
        """Takes the oldest turns out of what the model is told, as prepare_last did; returns the
        pictures that come with the next question.
        """
        state, told = self._state, self._told
        for i in range(state.first, state.first + n):
            state.turns[i] = replace(state.turns[i], pictures=[])
        state.first, state.left_out = state.first + n, state.left_out + n
        if not n or state.coming or any(turn.pictures for turn in told[n:]):
            return state.coming
        carried = next((turn.pictures for turn in reversed(told[:n]) if turn.pictures), [])
        if n == len(told):
            return carried
        state.turns[state.first] = replace(told[n], pictures=carried)
        return state.coming

    def retry(
        self,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Starts another answer to the last question, in place of the one that it has. PromptError
        before the first.
        """
        before = self._state.copy()
        question = self.undo()
        try:
            return self.stream(question, progress=progress, **options)
        except BaseException:
            self._state = before
            raise

    def undo(self) -> str:
        """Takes the last question with its answer back and returns it; pictures that came with it
        come with the next one. PromptError before the first.
        """
        state = self._state
        if not state.turns:
            raise PromptError("nothing was asked in this chat yet")
        turn = state.turns.pop()
        turn.answer.cancel()
        if state.first > len(state.turns):  # Other pictures were chosen since, or it was left out.
            state.first = len(state.turns)
            state.left_out = min(state.left_out, state.first)
        elif self._vlm.manifest.prompt.turn:
            state.coming = [*turn.pictures, *state.coming]
        return turn.question

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
        if not self._state.turns:
            raise PromptError("nothing was asked in this chat yet")
        return self._state.turns[-1].answer.reply

    def clear(self) -> None:
        """Forgets the turns; the pictures stay, and come with the next question."""
        self._state = _State([], self._shown)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the conversation with its pictures into a file, which `load` reads (docs/chat.md).

        A chat that was saved there before is replaced. Raises ChatFileError for a file that cannot
        be written or holds something else.
        """
        state = self._state
        said = [saved_chat.Said(t.question, t.pictures, t.answer.reply) for t in state.turns]
        saved_chat.write(
            file,
            self._vlm.manifest,
            saved_chat.Conversation(said, state.coming, state.first, state.left_out, self._system),
        )

    def load(self, file: str | os.PathLike[str]) -> None:
        """Goes on with a conversation that was saved, in place of this one.

        Its pictures are read, and encoded with the next question unless they are known. Raises
        ChatFileError for what is no such file, is damaged or another model's.
        """
        found = saved_chat.read(file, self._vlm.manifest)
        self.system = found.system
        turns = [_Turn(s.question, s.pictures, Answer.ended(s.reply)) for s in found.said]
        self._state = _State(turns, found.coming, found.first, found.left_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._state.turns:
            self._state.turns[-1].answer.cancel()


def _sources(shown: Sequence[Shown]) -> Images:
    """Sources of pictures, and videos: None, one, or a list."""
    found = [one.video if isinstance(one, Clip) else one.source for one in shown]
    sources = [source for source in found if source is not None]
    return sources if len(sources) > 1 else next(iter(sources), None)
