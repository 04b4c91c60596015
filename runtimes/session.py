"""VLM and Chat: a question and a picture in, an answer out. Knows no engine.

A VLM answers one request at a time; only `cancel` may be called from another thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.bundle import Manifest
from edgevlm.errors import PromptError
from edgevlm.family import Family
from edgevlm.image import ImageSource, read_image
from edgevlm.prompt import task_prompt
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.engines import TextDecoder, VisionEncoder
from edgevlm.runtimes.request import (
    History,
    Parts,
    Stopwatch,
    encode,
    input_rows,
    prefill,
    prepare,
)
from edgevlm.sampling import Sampling, SamplingOptions
from edgevlm.types import Box, Devices, Placement, Reply

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Unpack

Images = ImageSource | Sequence[ImageSource] | None


class VLM:
    """A loaded vision-language model. `edgevlm.load` makes one; close it or use it in a `with`.

    `image` is a path, URL, bytes, PIL image or array uint8 [h, w, 3], a list of those where the
    model takes several, or None. Options are those of `edgevlm.sampling.Sampling`; without any the
    answer is greedy. `devices` says where the two halves run.
    """

    def __init__(
        self,
        manifest: Manifest,
        family: Family,
        encoder: VisionEncoder,
        decoder: TextDecoder,
        *,
        load_ms: float = 0.0,
        devices: Devices | None = None,
    ) -> None:
        self.manifest = manifest
        self.load_ms = load_ms
        self.devices = devices or _only("cpu", encoder.provider)
        self.parts = Parts(manifest, family, encoder, decoder)
        self._turn = 0

    def stream(
        self, prompt: str, image: Images = None, **options: Unpack[SamplingOptions]
    ) -> Answer:
        """Starts an answer; iterate over it for its pieces.

        Raises ImageError, PromptError or ContextOverflow before anything is computed.
        """
        return self._start(prompt, image, (), Sampling.of(options))

    def _start(self, prompt: str, image: Images, history: History, sampling: Sampling) -> Answer:
        self.parts.cancelled.clear()
        request = prepare(self.parts, prompt, _several(image), sampling, history)
        self._turn += 1
        turn = self._turn
        return Answer(
            self.parts, request, load_ms=self.load_ms, superseded=lambda: self._turn != turn
        )

    def ask(self, prompt: str, image: Images = None, **options: Unpack[SamplingOptions]) -> Reply:
        """The whole answer to a prompt about a picture."""
        return self.stream(prompt, image, **options).finish()

    def chat(self, image: Images = None) -> Chat:
        """A conversation about a picture."""
        return Chat(self, image)

    def caption(
        self, image: Images, language: str = "en", **options: Unpack[SamplingOptions]
    ) -> Reply:
        """Describes the picture in a language given by its code. PromptError if it cannot."""
        return self.ask(self.task("caption", language=language), image, **options)

    def ocr(self, image: Images, **options: Unpack[SamplingOptions]) -> Reply:
        """Reads the text in the picture. PromptError if the model cannot."""
        return self.ask(self.task("ocr"), image, **options)

    def detect(
        self, objects: str | Sequence[str], image: Images, **options: Unpack[SamplingOptions]
    ) -> list[Box]:
        """Finds objects by name; boxes in pixels of the upright picture. PromptError if the model
        cannot.
        """
        return list(self.ask(self.task("detect", objects), image, **options).boxes)

    def task(self, task: str, prompt: str | Sequence[str] = "", language: str = "en") -> str:
        """The model's own prompt for a task; several objects are joined as the models expect."""
        text = prompt if isinstance(prompt, str) else " ; ".join(prompt)
        return task_prompt(self.manifest.prompt, task, text, language)

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
        `with_end` adds the end token, which makes answers of different length comparable.
        """
        model, end = self.parts, list(self.manifest.answer.stop_tokens[:1])
        ids = [model.decoder.tokenize(c) + (end if with_end else []) for c in continuations]
        if not all(ids):
            raise PromptError("a continuation is empty; there is nothing to score")
        longest = max(map(len, ids), default=1)
        request = prepare(model, prompt, _several(image), Sampling(max_tokens=longest))
        if request.max_tokens < longest:
            raise PromptError(f"a continuation of {longest} tokens does not fit the context")
        self._turn += 1
        prefix = input_rows(model, request)
        prefill(model, request, prefix, longest)
        first = model.decoder.logits()[None]
        scores = np.zeros(len(ids))
        for i, tokens in enumerate(ids):
            after = model.decoder.extend(tokens[:-1])
            scores[i] = _log_softmax(np.concatenate([first, after]))[
                range(len(tokens)), tokens
            ].sum()
            model.decoder.rollback(len(prefix))
        return scores

    def embed_image(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """The rows that stand for a picture in the decoder, float32 [tokens, n_embd]."""
        return encode(self.parts, read_image(image), Stopwatch())

    def forget(self) -> None:
        """Drops what is remembered of pictures: the next answer computes everything anew."""
        self._turn += 1
        self.parts.cache.clear()
        self.parts.decoder.clear()

    def cancel(self) -> None:
        """Ends the running answer within one token; may be called from any thread."""
        self.parts.cancelled.set()
        self.parts.encoder.cancel()
        self.parts.decoder.cancel()

    def close(self) -> None:
        """Frees the engines; the object is of no use afterwards."""
        self._turn += 1
        self.parts.encoder.close()
        self.parts.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Chat:
    """Questions about the same picture, whose rows are computed once.

    Models that were trained on conversations are told what was asked and answered before; the
    others answer each question on its own. `turns` keeps all of them for the reader. `image` may be
    set to another picture at any time; the model then starts afresh.
    """

    def __init__(self, vlm: VLM, image: Images = None) -> None:
        self._vlm = vlm
        self._image = image
        self._first = 0
        self.turns: list[tuple[str, Answer]] = []

    @property
    def devices(self) -> Devices:
        """Where the two halves of the model run."""
        return self._vlm.devices

    @property
    def image(self) -> Images:
        """What the questions are about."""
        return self._image

    @image.setter
    def image(self, image: Images) -> None:
        self._image, self._first = image, len(self.turns)

    def stream(self, prompt: str, **options: Unpack[SamplingOptions]) -> Answer:
        """Starts the next answer; see VLM.stream."""
        turns = self.turns[self._first :] if self._vlm.manifest.prompt.turn else []
        history = [(question, answer.reply) for question, answer in turns]
        answer = self._vlm._start(prompt, self._image, history, Sampling.of(options))
        self.turns.append((prompt, answer))
        return answer

    def ask(self, prompt: str, **options: Unpack[SamplingOptions]) -> Reply:
        """The whole next answer."""
        return self.stream(prompt, **options).finish()

    @property
    def reply(self) -> Reply:
        """The last answer as far as it has come. PromptError before the first."""
        if not self.turns:
            raise PromptError("nothing was asked in this chat yet")
        return self.turns[-1][1].reply

    def clear(self) -> None:
        """Forgets the turns; the picture stays."""
        self.turns.clear()
        self._first = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._vlm.cancel()


def _only(device: str, engine: str) -> Devices:
    return Devices(Placement("auto", device, engine), Placement("auto", device, engine))


def _several(image: Images) -> Sequence[ImageSource]:
    if image is None:
        return []
    return image if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z
