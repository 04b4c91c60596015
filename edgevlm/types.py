"""Results: answers, their measurements, boxes. Units stand in the names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from edgevlm.errors import PromptError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "cancelled"]
FlashAttention = Literal["auto", "on", "off"]
Repacking = Literal["off", "on", "decode"]
REPACKINGS: tuple[Repacking, ...] = ("off", "on", "decode")


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of one answer.

    `image` and `text` are the positions of the prompt; `cached` says how many of them did not
    have to be computed again (image embeddings that were known, or a KV cache that was kept);
    `kept` says how many of those the decoder did not read again; `generated` counts the
    answer without its end token. `tiles` are the squares that the pictures were cut into.
    """

    image: int = 0
    text: int = 0
    cached: int = 0
    generated: int = 0
    kept: int = 0
    tiles: int = 0

    @property
    def prompt(self) -> int:
        """All positions before the answer."""
        return self.image + self.text


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage of one answer, in milliseconds.

    `load_ms` is the time the model took to load, whichever answer it was for. `first_token_ms`
    runs from the request to the first token of the answer, `total_ms` to its end; `decode_ms` is
    the part after the first token.
    """

    load_ms: float = 0.0
    image_decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    projector_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


def shortened(text: str, most: int = 40) -> str:
    """A text's beginning, for a repr."""
    return text if len(text) <= most else f"{text[:most]}…"


@dataclass(frozen=True)
class Box:
    """A found object: corners in pixels of the picture as it was given (EXIF-rotated), x to the
    right, y down, and its label. `segment` holds the 16 `<segNNN>` indices where a model gave them,
    `mask` what they stand for, bool [h, w] of the picture's pixels, where it was asked for and the
    bundle can decode it.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    label: str
    segment: tuple[int, ...] = ()
    mask: npt.NDArray[np.bool_] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        corners = f"{self.x0:.0f} {self.y0:.0f} {self.x1:.0f} {self.y1:.0f}"
        masked = ", with its mask" if self.mask is not None else ""
        return f"<Box {shortened(self.label)!r} {corners}{masked}>"

    def _repr_html_(self) -> str:
        # Upwards, and only where a notebook asks: this module is everybody's.
        return str(import_module("edgevlm.notebook").found(self))

    def normalized(self, width: int, height: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 as shares, 0 to 1, of a picture's sides in pixels."""
        return (self.x0 / width, self.y0 / height, self.x1 / width, self.y1 / height)


@dataclass(frozen=True)
class Point:
    """A found object's middle: a place in pixels of the picture as it was given (EXIF-rotated), x
    to the right, y down, and its label.

    >>> edgevlm.Point(30, 40, "star").normalized(120, 80)
    (0.25, 0.5)
    """

    x: float
    y: float
    label: str

    def __repr__(self) -> str:
        return f"<Point {shortened(self.label)!r} {self.x:.0f} {self.y:.0f}>"

    def _repr_html_(self) -> str:
        return str(import_module("edgevlm.notebook").found(self))  # as Box does it

    def normalized(self, width: int, height: int) -> tuple[float, float]:
        """x, y as shares, 0 to 1, of a picture's sides in pixels."""
        return (self.x / width, self.y / height)


@dataclass(frozen=True)
class LabelScore:
    """A label, what a dual encoder says of it for a picture (0 to 1), and the cosine of the two."""

    label: str
    score: float
    cosine: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log-probability, in the softmax of all the model's logits before
    penalties, temperature, top-k and the like, and before any grammar.

    `data` are the bytes that it stands for, none for a control token; `text` is what can be shown
    of them, with a replacement for characters that it holds only a part of. `top` are the
    likeliest tokens in its place, the likeliest first, as many as were asked for.
    """

    token_id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer as it streams.

    `text` holds whole characters only and may be empty while a character or a stop string is
    still open. `token_ids` are the tokens that came with this piece, `logprobs` their
    log-probabilities where those were asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    elapsed_ms: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Constraint:
    """Form that an answer is held to: the grammar (GBNF) that its text fits, made of a schema or of
    choices, or as it was given. `model` is the class whose schema it is, as pydantic's are.
    """

    kind: Literal["schema", "choices", "grammar"]
    grammar: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)
    model: Any = None

    def grammar_after(self, *, blank: bool) -> str:
        """The grammar for an answer before which a `blank` may stand that is no part of it."""
        if not blank or self.kind == "grammar":
            return self.grammar
        answer = re.sub("^root ::=", "answer ::=", self.grammar, flags=re.MULTILINE)
        return f'{answer}root ::= " "? answer\n'

    def read(self, text: str) -> Any:
        """The value that an answer's text stands for; raises ValueError where it is not whole."""
        if self.kind == "grammar":
            return text
        if self.kind == "choices":
            if text not in self.choices:
                raise ValueError(f"{text!r} is not one of the choices")
            return text
        value = json.loads(text)
        return value if self.model is None else self.model.model_validate(value)


@dataclass(frozen=True)
class Reply:
    """A whole answer. Prints as its text.

    >>> with edgevlm.load() as vlm:
    ...     reply = vlm.ask("answer en what shape is red?", "photo.png")
    >>> print(reply, reply.finish_reason, reply.tokens.image)
    circle stop 64

    `token_ids` lack the end token. `boxes` are the objects that the text locates, where the family
    has a notation for them and there was one picture, or that a model finds by other means than
    words; `points` are those that it points at. The text then has a line for each, and no tokens.
    `logprobs` has an entry for each of `token_ids` where those were asked for, and none otherwise.
    `constraint` is the form that it was held to, None for free text. Where there was one picture,
    `size` is its width and height in pixels, and `picture` its source as it was given, where there
    are `boxes` or `points`, for notebooks.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    tokens: TokenCounts = field(default_factory=TokenCounts)
    timings: Timings = field(default_factory=Timings)
    boxes: tuple[Box, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    constraint: Constraint | None = None
    picture: Any = field(default=None, compare=False)
    size: tuple[int, int] | None = None
    points: tuple[Point, ...] = ()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        boxes = f", {len(self.boxes)} boxes" if self.boxes else ""
        boxes += f", {len(self.points)} points" if self.points else ""
        return (
            f"<Reply {shortened(self.text)!r}, {self.finish_reason}, "
            f"{self.tokens.generated} tokens{boxes}>"
        )

    def _repr_html_(self) -> str:
        return str(import_module("edgevlm.notebook").html(self))  # as Box does it

    @property
    def parsed(self) -> Any:
        """The value of an answer that was asked for with `schema` (what its JSON stands for, or an
        object of the class that was given), `choices` or `grammar` (its text).

        Raises PromptError where it was asked for with none of them, or is not whole.

        >>> schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        >>> with edgevlm.load() as vlm:
        ...     reply = vlm.ask("answer en how many shapes?", "photo.png", schema=schema)
        >>> type(reply.parsed["n"])
        <class 'int'>
        """
        if self.constraint is None:
            raise PromptError("this answer is free text; ask with schema=, choices= or grammar=")
        if self.finish_reason == "length" and self.constraint.kind == "grammar":
            raise PromptError(self._cut)
        try:
            return self.constraint.read(self.text)
        except (ValueError, RecursionError) as e:
            cut = {"length": self._cut, "cancelled": "the answer was cancelled; ask again"}
            reason = " ".join(str(e).split())
            raise PromptError(
                cut.get(self.finish_reason, f"the answer does not fit what was asked for: {reason}")
            ) from None

    @property
    def _cut(self) -> str:
        return (
            f"the answer was cut at {self.tokens.generated} tokens and is not whole; raise "
            "max_tokens or ask for less"
        )

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 for answers of fewer than two tokens."""
        steps = self.tokens.generated - 1
        return steps * 1e3 / self.timings.decode_ms if steps > 0 and self.timings.decode_ms else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens that the decoder's prefill read per second; 0 when nothing was computed."""
        ms, read = self.timings.prefill_ms, self.tokens.prompt - self.tokens.kept
        return read * 1e3 / ms if ms else 0.0


@dataclass(frozen=True)
class Placement:
    """Placement of one part of a model: the device asked for, the one that really runs it, and why.

    `asked` is the caller's word ("auto", "gpu"), `device` the word of what runs ("cpu",
    "openvino:npu"), `engine` the engine's own name for it, `hardware` the device's name where the
    engine knows one. `placed` of `total` `unit` ("nodes" of the graphs, "layers" of the decoder)
    run there and the rest on the CPU; on the CPU both are 0. `precision` is that of the file.
    `cosine` is how near the numbers come to those of float32 (to the CPU's, where the bundle has
    none), 1 at best; None on the CPU. `notes` say why something else did not run, one reason each.
    """

    asked: str
    device: str
    engine: str
    hardware: str = ""
    placed: int = 0
    total: int = 0
    unit: str = ""
    precision: str = ""
    cosine: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.device]
        if self.total > self.placed:
            left = self.total - self.placed
            parts.append(f"{self.placed} of {self.total} {self.unit}, {left} on the CPU")
        elif self.total:
            parts.append(f"all {self.total} {self.unit}")
        if self.cosine is not None:
            parts.append(f"cosine {self.cosine:.4f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Devices:
    """Placements of a loaded model's encoder and decoder."""

    vision: Placement
    decoder: Placement


@dataclass(frozen=True)
class RunSettings:
    """Settings that a loaded model really runs with.

    `threads` draw tokens, `prefill_threads` read the input and `vision_threads` encode pictures.
    `repacking` says whether the decoder's quantized weights are re-ordered at load: "on" for
    everything, "decode" to draw tokens with, beside the file's own order for reading the input, or
    "off". `kv` is the type of the KV cache ("f32", "f16", "q8_0"). `flash_attention` is "on", "off"
    or, before the first question where llama.cpp chooses, "auto". `batch` is how many rows the
    decoder reads at once and `context` how many fit its KV cache; both are 0 before the first
    question and grow with what is asked. `tuned` says whether `edgevlm tune` measured them here,
    `apart` whether encoder and decoder take turns in memory, which has no room for both.
    """

    threads: int
    repacking: Repacking
    kv: str
    flash_attention: FlashAttention
    batch: int = 0
    context: int = 0
    prefill_threads: int = 0
    vision_threads: int = 0
    tuned: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Progress:
    """Progress of a long stage: `done` of `total` in `unit` ("B", "tensors", "tiles")."""

    stage: str
    done: int
    total: int
    unit: str = ""
