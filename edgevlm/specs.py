"""A model's specs as plain frozen data: picture, prompt, decoder, answer.

A family fills these from a checkpoint's config, the bundle stores them, the runtime obeys them.
None of them knows an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["causal", "prefix"]
Fit = Literal["stretch", "pad", "crop"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of a picture to pixels, float32 [3, size, size].

    `size` is the side in pixels, `tokens` the image embeddings of one such square. `rescale`
    is what bytes are multiplied by; `mean` and `std` are per channel on the scale that comes of it.
    `max_pictures` bounds one request. `fit` says how it becomes a square: `stretch` does not keep
    the aspect ratio, `pad` puts it in the middle of a square of the colour `fill` (of `mean` where
    it is None), `crop` keeps only the middle of the long side. `resize` is the side, of `crop` the
    short one, that it is resized to before `size` is cut out of its middle; 0 is `size` itself.
    """

    size: int
    tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    max_pictures: int = 1
    fit: Fit = "stretch"
    resize: int = 0
    rescale: float = 1 / 255
    fill: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class PromptSpec:
    """Layout of the decoder's input around a question.

    `template` lists the items in order. One is `{image}` (the embeddings of every picture),
    `{bos}` (the begin token), `{id:N}` (the token with that id) or text, in which `{prompt}` stands
    for the user's words; every text is tokenized by itself. `tasks` maps a task (caption,
    answer, detect, ocr) to its prompt, in which `{language}` and `{prompt}` are filled in.
    `text_template` is the template of a request without pictures, where it is another. `turn` holds
    the items between an answer and the end of the next question, for models that were trained on
    conversations; without `{image}` in it pictures come with the first question only. With `joined`
    the texts of a conversation that follow one another are tokenized as one, answers included,
    where the original code does that.
    """

    template: tuple[str, ...]
    text_template: tuple[str, ...] = ()
    turn: tuple[str, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    joined: bool = False


@dataclass(frozen=True)
class DecoderSpec:
    """The language decoder: its GGUF architecture and sizes.

    `attention` is `prefix` where picture and prompt attend to each other both ways and only the
    answer is causal, `causal` otherwise. `context_length` is the largest number of positions.
    `extra_norms` says that the GGUF's metadata holds norms which llama.cpp's graph lacks; edgevlm's
    runtime adds them, and without it the file would answer nonsense.
    """

    architecture: str
    attention: Attention
    n_embd: int
    n_layer: int
    n_vocab: int
    context_length: int
    extra_norms: bool = False


@dataclass(frozen=True)
class AnswerSpec:
    """Stop tokens of an answer, its default length, and what is left out of it.

    With `strip`, blanks around it are no part of it, nor is a `role` ("Assistant:") that a model
    says before it. The repetition penalty counts `penalized` tokens as if the answer had them.
    """

    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    max_tokens: int = 256
    strip: bool = False
    role: str = ""
    penalized: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorLocation:
    """Location of the token-embedding table in the GGUF file, so that single rows can be read.

    `offset` is in bytes from the start of the file, `type` a ggml type name such as "Q6_K", the
    shape is [rows, width].
    """

    offset: int
    type: str
    rows: int
    width: int
