"""Questions in a model's own prompts: short forms of `ask`. Knows no engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgevlm.manifest import Manifest
from edgevlm.prompt import caption_task, task_prompt
from edgevlm.runtimes.messages import Images, Message
from edgevlm.sampling import SamplingOptions, task_options
from edgevlm.types import Box, Point, Progress, Reply

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Tasks(ABC):
    """Tasks of a model that `ask` answers, as VLM has them."""

    manifest: Manifest

    @abstractmethod
    def ask(
        self,
        messages: str | Sequence[Message],
        image: Images = None,
        *,
        system: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Reply:
        """The whole answer; see VLM.ask."""

    def caption(
        self, image: Images, language: str = "en", *, length: str = "normal",
        **options: Unpack[SamplingOptions],
    ) -> Reply:  # fmt: skip
        """Describes the picture in a language given by its code; `length` is "short" or "long" for
        models that were trained on such. PromptError if it cannot.

        >>> with edgevlm.load() as vlm:
        ...     print(vlm.caption("photo.png"))
        a red circle, a blue square, a yellow triangle and a green star
        """
        prompt = self.task(caption_task(length), language=language)
        return self.ask(prompt, image, **options)

    def ocr(self, image: Images, **options: Unpack[SamplingOptions]) -> Reply:
        """Reads the text in the picture. PromptError if the model cannot.

        >>> with edgevlm.load() as vlm:
        ...     print(vlm.ocr("sign.png"))
        OPEN
        """
        options = task_options("ocr", self.manifest.answer) | options
        return self.ask(self.task("ocr"), image, **options)

    def detect(
        self, objects: str | Sequence[str], image: Images, **options: Unpack[SamplingOptions]
    ) -> list[Box]:
        """Finds objects by name; boxes in pixels of the upright picture. PromptError if the model
        cannot.

        >>> with edgevlm.load() as vlm:
        ...     print([box.label for box in vlm.detect(["circle", "star"], "photo.png")])
        ['circle', 'star']
        """
        return list(self.ask(self.task("detect", objects), image, **options).boxes)

    def point(
        self, objects: str | Sequence[str], image: Images, **options: Unpack[SamplingOptions]
    ) -> list[Point]:
        """Points at objects by name; places in pixels of the upright picture. PromptError if the
        model cannot.
        """
        return list(self.ask(self.task("point", objects), image, **options).points)

    def answer(
        self, question: str, image: Images = None, language: str = "en",
        **options: Unpack[SamplingOptions],
    ) -> Reply:  # fmt: skip
        """Answers a question in the model's own prompt for questions, where it has one.

        >>> with edgevlm.load() as vlm:
        ...     print(vlm.answer("what shape is red?", "photo.png"))
        circle
        """
        return self.ask(self.task("answer", question, language), image, **options)

    def ground(self, image: Images, **options: Unpack[SamplingOptions]) -> Reply:
        """Describes the picture and locates what it names: `boxes` of the reply. PromptError if the
        model cannot.
        """
        return self.ask(self.task("ground"), image, **options)

    def task(self, task: str, prompt: str | Sequence[str] = "", language: str = "en") -> str:
        """The model's own prompt for a task; several objects are joined as the models expect."""
        return task_prompt(self.manifest.prompt, task, prompt, language)
