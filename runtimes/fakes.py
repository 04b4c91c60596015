"""Engines without weights: the same protocols, instant and predictable.

For tests, and for programs that embed edgevlm and want to test themselves without a model:

    vlm = edgevlm.runtimes.fakes.vlm(answer="a red circle")
    assert vlm.ask("caption en", image=picture).text == "a red circle"

`dual` is a dual encoder that knows colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from edgevlm.boxes import parse_loc
from edgevlm.family import Family, Model
from edgevlm.manifest import FORMAT, Component, FileRecord, Manifest
from edgevlm.runtimes.dual import DualEncoder, Sides
from edgevlm.runtimes.engines import Block, Recall, Told
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.specs import (
    AnswerSpec,
    DecoderSpec,
    ImageSpec,
    PromptSpec,
    TensorLocation,
    TextSpec,
    VideoSpec,
)
from edgevlm.types import Placement, RunSettings

Float = npt.NDArray[np.float32]

_END, _BOS, _FIRST_BYTE = 0, 1, 2
_N_VOCAB = _FIRST_BYTE + 256
_N_EMBD = 4


class FakeEncoder:
    """VisionEncoder whose embeddings all hold the mean of the pixels; `calls` counts pictures."""

    provider = "fake"

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.calls = 0

    def features(self, pixels: Float) -> Float:
        """Pixels [n, 3, size, size] -> [n, tokens, 4], the mean of each channel and a zero."""
        self.calls += len(pixels)
        means = np.pad(pixels.mean((2, 3)), ((0, 0), (0, 1)))
        return np.repeat(means[:, None], self._tokens, 1)

    def project(self, features: Float) -> Float:
        """The features as they are."""
        return features

    def cancel(self) -> None:
        """Nothing runs long enough to be cancelled."""

    def release(self) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing is held."""


class FakeDecoder:
    """TextDecoder over bytes that says the given answers in turn, the last one again and again.

    An answer may be bytes, to test text that is not whole characters. `prefills` keeps the rows of
    all blocks of every prompt it has read.
    """

    bos = _BOS
    blocks: Sequence[Block] = ()
    reading = ""
    settings = RunSettings(1, "off", "f32", "off")

    def __init__(self, answers: Iterable[str | bytes]) -> None:
        self._answers = [a.encode() if isinstance(a, str) else a for a in answers]
        self._script: list[int] = []
        self._past = 0
        self._start = 0
        self.prefills: list[Float] = []

    def tokenize(self, text: str) -> list[int]:
        """One token a byte."""
        return [_FIRST_BYTE + b for b in text.encode()]

    def piece(self, token: int) -> bytes:
        """The byte; nothing for the end token."""
        return bytes([token - _FIRST_BYTE]) if token >= _FIRST_BYTE else b""

    def writes(self, token: int) -> bool:
        """Every one."""
        return True

    def embed(self, tokens: Sequence[int]) -> Float:
        """Rows [n, 4] that hold the token id."""
        return np.repeat(np.array(tokens, np.float32)[:, None], _N_EMBD, 1)

    def prefill(
        self,
        blocks: Sequence[Block],
        *,
        room: int,
        recall: Recall | None = None,
        told: Told | None = None,
    ) -> int:
        """Starts the next answer; keeps nothing."""
        self.prefills.append(np.concatenate([block.rows for block in blocks]))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self._script = [_FIRST_BYTE + b for b in answer] + [_END]
        self._past = self._start = len(self.prefills[-1])
        if told:
            told(0, self._past)
            told(self._past, self._past)
        return 0

    def state(self) -> memoryview:
        """Empty: nothing is kept from one prefill to the next."""
        return memoryview(b"")

    def clear(self) -> None:
        """Nothing is kept from one prefill to the next."""

    def extend(self, tokens: Sequence[int]) -> Float:
        """Logits [n, n_vocab] after each token."""
        rows = [np.empty((0, _N_VOCAB), np.float32)]
        for token in tokens:
            self.step(token)
            rows.append(self.logits()[None])
        return np.concatenate(rows)

    def step(self, token: int) -> None:
        """Moves on by one position, whatever the token."""
        self._past += 1

    def logits(self) -> Float:
        """Ten for the next token of the answer, zero for all others."""
        logits = np.zeros(_N_VOCAB, np.float32)
        logits[self._script[min(self._past - self._start, len(self._script) - 1)]] = 10
        return logits

    def watch(self) -> None:
        """There is no last layer."""

    def hidden(self) -> Float:
        """Zeros."""
        return np.zeros(_N_EMBD, np.float32)

    def step_row(self, row: Float) -> None:
        """Moves on by one position."""
        self._past += 1

    def rule_out(self, tokens: Sequence[int]) -> None:
        """Nothing: the given answers are said."""

    def rollback(self, n: int) -> None:
        """Goes back to n positions."""
        self._past = n

    def sampler(
        self,
        sampling: Sampling,
        penalized: Sequence[int] = (),
        *,
        grammar: str = "",
        stop: Sequence[int] = (),
    ) -> FakeSampler:
        """Greedy, whatever is asked for: the given answers are said with a grammar, too."""
        return FakeSampler(self)

    def cancel(self) -> None:
        """Nothing runs long enough to be cancelled."""

    def release(self) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing is held."""


class FakeSampler:
    """TokenSampler that takes the likeliest token."""

    def __init__(self, decoder: FakeDecoder) -> None:
        self._decoder = decoder

    def sample(self) -> int:
        """The arg max."""
        return int(self._decoder.logits().argmax())

    def close(self) -> None:
        """Nothing is held."""


def _not_a_checkpoint(_: object) -> Model:
    raise ValueError("the fake family has no checkpoints")


def vlm(
    answer: str | bytes | Sequence[str | bytes] = "a picture",
    *,
    size: int = 8,
    tokens: int = 4,
    max_pictures: int = 2,
    context_length: int = 512,
    conversational: bool = False,
    system: bool = False,
    later_pictures: bool = False,
    films: bool = False,
) -> VLM:
    """A VLM on fakes, of PaliGemma's shape, that gives these answers in turn; a conversational one
    is told in a chat what was said before, with `later_pictures` of pictures in any question, with
    `system` it takes a system message, and with `films` it is shown videos.
    """
    before = ("{system}|", "{image}", "{bos}", "{prompt}\n")
    turn = (*["{image}"] * later_pictures, "{prompt}\n") if conversational else ()
    film = VideoSpec(
        2.0, 6, ("{image}", "{bos}", "{prompt}\n"), system_template=before, turn=turn,
        frame="{time} ",
    )  # fmt: skip
    answers = [answer] if isinstance(answer, (str, bytes)) else answer
    manifest = Manifest(
        format=FORMAT,
        family="fake",
        name="fake",
        license="Apache-2.0",
        components={},
        image=ImageSpec(size, tokens, (0.5,) * 3, (0.5,) * 3, max_pictures=max_pictures),
        prompt=PromptSpec(
            ("{image}", "{bos}", "{prompt}\n"),
            turn=turn,
            system_template=before if system else (),
            video=film if films else None,
            tasks={
                "caption": "caption {language}",
                "detect": "detect {prompt}",
                "ocr": "ocr",
                "segment": "segment {prompt}",
            },
        ),
        decoder=DecoderSpec("fake", "prefix", _N_EMBD, 1, _N_VOCAB, context_length),
        answer=AnswerSpec(stop_tokens=(_END,)),
        token_embedding=TensorLocation(0, "F32", _N_VOCAB, _N_EMBD),
    )
    family = Family("fake", "Apache-2.0", (), _not_a_checkpoint, lambda _: None, parse_loc)
    return VLM(manifest, family, FakeEncoder(tokens), FakeDecoder(answers))


COLOURS = ("red", "green", "blue")


class FakeRows:
    """RowEncoder of pixels [n, 3, size, size] or ids [n, tokens] -> unit rows [n, 3]: how much red,
    green and blue there is; `calls` counts pictures and texts.
    """

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, batch: npt.NDArray[np.generic]) -> Float:
        """See RowEncoder."""
        self.calls += len(batch)
        if batch.ndim == 4:
            seen = (batch.astype(np.float32).mean((2, 3)) + 1) / 2
        else:
            seen = np.stack([(batch == i).sum(1) for i in range(3)], 1).astype(np.float32)
        seen = seen + np.float32(1e-3)
        rows: Float = seen / np.linalg.norm(seen, axis=1, keepdims=True)
        return rows

    def cancel(self) -> None:
        """Nothing runs long enough to be cancelled."""

    def close(self) -> None:
        """Nothing is held."""


def _colour_ids(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """A token for each colour that a text names, 3 where it names none, filled up with 3."""
    found = [[i for i, colour in enumerate(COLOURS) if colour in text] for text in texts]
    longest = max(map(len, found), default=0) or 1
    return np.array([(ids + [3] * longest)[:longest] for ids in found], np.int64).reshape(
        len(found), longest
    )


def dual(*, size: int = 8) -> DualEncoder:
    """A DualEncoder on fakes: rows of pictures say how red, green and blue they are, those of texts
    which of these words are in them.
    """
    placement = Placement("cpu", "cpu", "fake", "")
    parts = {
        role: Component("fp32", (FileRecord(f"{role}.onnx", 0, ""),)) for role in ("vision", "text")
    }
    manifest = Manifest(
        format=FORMAT,
        family="clip",
        name="fake",
        license="Apache-2.0",
        components=parts,
        image=ImageSpec(size, 1, (0.5,) * 3, (0.5,) * 3),
        text=TextSpec(tokens=8, width=3, scale=10.0),
    )
    sides = Sides(lambda: (FakeRows(), placement), lambda: (FakeRows(), _colour_ids))
    return DualEncoder(manifest, sides)
