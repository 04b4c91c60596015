"""A model's specs as plain frozen data: picture, prompt, decoder, answer.

A family fills these from a checkpoint's config, the bundle stores them, the runtime obeys them.
None of them knows an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Attention = Literal["causal", "prefix", "blocks", "opening"]
Fit = Literal["stretch", "pad", "crop", "letterbox"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
TileRule = Literal["longest-edge", "ratio", "pinpoints", "pan-and-scan", "hd", "overlap"]
Overview = Literal["none", "first", "last"]
# How a text is changed before it is tokenized, beside what its tokenizer does itself.
Clean = Literal["", "lower", "siglip", "canonicalize"]
Positions = Literal["sequential", "mrope"]


@dataclass(frozen=True)
class MapSpec:
    """The image embeddings of a picture's tiles as one map, which is read line by line.

    Lines and columns that hold padding alone are left out; what stays is a whole number, cut off
    after `digits` decimals where that is not None. A map of more than `most` tiles, by a tenth of
    its sides, is resized to as many; 0 is no bound. The newline, a row that the bundle holds, ends
    every line, and a picture that is not cut. With `separated` it ends those of the overview, too,
    which stands last, behind a second such row.
    """

    most: int = 0
    digits: int | None = None
    separated: bool = False


@dataclass(frozen=True)
class TileSpec:
    """The cutting of a picture into square tiles, each of which the encoder sees by itself.

    `rule` chooses the grid. `longest-edge`: the long side is resized to `longest_edge` pixels, then
    both sides are stretched to multiples of a tile. `ratio`: of all grids of `least` to `most`
    tiles the one whose shape is the nearest to the picture's, which is stretched to it.
    `pinpoints`: the picture is resized in its own shape to that of the `canvases`, widths and
    heights, on which most of it is left and least is empty, the first of equals, and lies in the
    middle of it on black. `pan-and-scan`: a long picture is cut along its long side into 2 to
    `most` parts, each of which is stretched to a tile. `hd`: the picture is resized in its own
    shape, its long side to as many tiles as leave no more than `most` of them, and lies in the
    middle of whole tiles on `fill`; one that is higher than wide is laid down for that and set up
    again. `overlap`: of at most `most` tiles, which share `margin` patches on each side with their
    neighbours; the picture is stretched to them, and the projector reads one map of all tiles,
    without what two of them share, squeezed to the overview's size and beside it. A picture of one
    tile is not cut, and with `split` off none is. `overview` is where the whole picture stands
    among the tiles, as one more, squeezed from what `overview_of` says: the canvas that they are
    cut from, the picture itself, or the pixels that the canvas became, bicubic and without a filter
    for what is left out. `max_tiles` bounds the tiles of a picture, its overview among them, by a
    coarser grid; 0 is no bound, 1 no cutting. With `alone` only a picture that is the only one of a
    request is cut, and several become a square as the fit "pad" has it. `map` joins the tiles'
    image embeddings; without it they stand one tile after the other.
    """

    rule: TileRule
    longest_edge: int = 0
    split: bool = True
    overview: Overview = "last"
    max_tiles: int = 0
    least: int = 1
    most: int = 0
    canvases: tuple[tuple[int, int], ...] = ()
    overview_of: Literal["canvas", "picture", "pixels"] = "canvas"
    fill: tuple[int, int, int] = (0, 0, 0)
    alone: bool = False
    map: MapSpec | None = None
    margin: int = 0


@dataclass(frozen=True)
class SelfCheck:
    """Numbers that a machine compares its own with before it trusts an encoder.

    features, embeddings: sketches (`edgevlm.self_check`) of what the float32 graphs make of the
    fixed picture; of a dual encoder `features` is that of its row, and `text` that of the fixed
    text's. tolerances: 1 - cosine that a vision encoder may be off by, by its precision, and under
    "text" the text tower.
    """

    features: tuple[float, ...]
    embeddings: tuple[float, ...]
    tolerances: Mapping[str, float]
    text: tuple[float, ...] = ()


@dataclass(frozen=True)
class NativeSpec:
    """A picture that the encoder sees whole and in nearly its own shape, as large as it is.

    Both sides become multiples of the square of the spec, so that the picture has from `least` to
    `most` pixels; one of a side of more than 200 times the other is refused. `max_pixels` bounds
    them further, whatever `least` says; 0 is no bound.
    """

    least: int
    most: int
    max_pixels: int = 0


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of a picture to pixels, float32 [tiles, 3, size, size].

    `size` is the side in pixels, `tokens` the image embeddings of one such square. `tiles` says how
    a picture is cut into several; it is one square where that is None. With `native` it is one
    rectangle of such squares instead, pixels float32 [1, 3, height, width]. `rescale`
    is what bytes are multiplied by; `mean` and `std` are per channel on the scale that comes of it.
    `max_pictures` bounds one request. `fit` says how it becomes a square: `stretch` does not keep
    the aspect ratio, `pad` puts it in the middle of a square of the colour `fill` (of `mean` where
    it is None), `crop` keeps only the middle of the long side, `letterbox` resizes it in its own
    shape and puts it in the middle of such a square after that. `resize` is the side, of `crop` the
    short one, that it is resized to before `size` is cut out of its middle; 0 is `size` itself.
    With `letterbox` the short side becomes at least `shortest`, and is the integer below what the
    `rounding` gives in floating point: its `share` of the long side, times `size`, or the side
    times the `scale` of the picture.
    `exact` is the type that pixels are computed in, "bfloat16" where the original rounds them so.
    `rgb` says when a picture becomes RGB: `first`, which drops its transparency, or `last`, after
    it was resized as its file has it: transparent pixels then lie on white, and palettes and greys
    are resized by their nearest pixels.
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
    shortest: int = 1
    rounding: Literal["share", "scale"] = "share"
    tiles: TileSpec | None = None
    rgb: Literal["first", "last"] = "first"
    native: NativeSpec | None = None
    exact: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class PictureLayout:
    """Texts and tokens around the image embeddings of a picture.

    Each is a list of items: `{image}`, the embeddings of the whole picture or of one tile, `{bos}`,
    the begin token, or text.
    `whole` is a picture that was not cut. Of one that was, every tile is written as `tile`, in
    which `{row}` and `{column}` count from 1, every line of tiles ends in `line`, and the overview
    is `overview`; without `tile` it is written as `whole`, too. Before each picture of a request
    with several stands `several`, in which `{number}` counts them from 1. An item that `tokens`
    lists is that token; other text is tokenized with the text around it.
    """

    whole: tuple[str, ...]
    tile: tuple[str, ...] = ()
    line: tuple[str, ...] = ()
    overview: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSpec:
    """Frames of a video that a model is shown, and the texts around them.

    `fps` frames a second are taken, evenly and `most` at most; where that bound is far from what
    there is, not from the first and the last `skip` seconds. Each is a picture that is not cut,
    whose long side becomes `longest_edge` pixels on the way. `template`, `system_template` and
    `turn` are those of PromptSpec for a question that a video opens, which is one `{image}`;
    without `turn`, in a bundle that is older, a video comes with the first question only.
    `opening` stands before all frames, `frame` before each and `closing` behind all of them, in
    which `{count}` is their number in words, `{duration}` the video's in hours, minutes and
    seconds, and `{time}` a frame's in minutes and seconds.

    With `pairs` the encoder sees two frames at a time, of an odd number the last one twice, and
    the decoder reads the embeddings of all pairs as those of one picture that goes on in time.
    Frames are then an even number from `least` on, the first ones of equal stretches. `native` are
    the bounds of a frame, and `total` is that of the pixels of all pairs. A second has `per_second`
    positions in time, and two pairs are as many whole seconds apart as their frames; with 0 it is
    one position.
    """

    fps: float
    most: int
    template: tuple[str, ...]
    skip: float = 0.0
    longest_edge: int = 0
    system_template: tuple[str, ...] = ()
    turn: tuple[str, ...] = ()
    opening: str = ""
    frame: str = ""
    closing: str = ""
    pairs: bool = False
    least: int = 1
    native: NativeSpec | None = None
    total: int = 0
    per_second: int = 0

    def image(self, spec: ImageSpec, n: int) -> ImageSpec:
        """The spec of each of `n` frames where `spec` is that of a picture."""
        tiles, native = spec.tiles, spec.native
        if tiles:
            tiles = replace(tiles, longest_edge=self.longest_edge, max_tiles=1)
        if self.native:
            # What is left for each frame, as qwen_vl_utils bounds it.
            share = max(2 * self.total // n, int(self.native.least * 1.05))
            bounds = [self.native.max_pixels, native.max_pixels if native else 0, share]
            native = replace(self.native, max_pixels=min(bound for bound in bounds if bound))
        return replace(spec, max_pictures=self.most, tiles=tiles, native=native)


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
    where the original code does that. `text_turn` is the turn of a question without a picture,
    where it is another. `picture` is written in place of each `{image}`, and neighbouring texts are
    then tokenized as one; `reply` stands before an answer that is given as text. With `strip`
    blanks around a question or such an answer are no part of it, but for those between a picture
    and its words; with `trim` those around a question or any answer, wherever it stands.
    `normalize` is the form of Unicode that every text is brought to before it is tokenized, "" for
    none: llama.cpp's tokenizers do not. `answered` is the last item of each template before an
    answer that is given, where the original writes another there than before one that is to come.
    `system_template` and `system_text_template` are `template` and `text_template` of a
    conversation with a system message, in which `{system}` stands for its words; the first is empty
    where the original's template knows none. `task_templates` are the templates of tasks that the
    original writes otherwise than questions, by task; `{prompt}` in them is what the task is about.
    `video` is None of models that were not trained on videos.
    """

    template: tuple[str, ...]
    text_template: tuple[str, ...] = ()
    turn: tuple[str, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    joined: bool = False
    text_turn: tuple[str, ...] = ()
    picture: PictureLayout | None = None
    reply: str = ""
    strip: bool = False
    trim: bool = False
    normalize: Literal["", "NFC"] = ""
    answered: str = ""
    system_template: tuple[str, ...] = ()
    system_text_template: tuple[str, ...] = ()
    task_templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    video: VideoSpec | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """The language decoder: its GGUF architecture and sizes.

    `attention` is `prefix` where picture and prompt attend to each other both ways and only the
    answer is causal, `blocks` where the image embeddings of a tile attend to each other both ways
    and all else is causal, `opening` where the prompt begins with a picture and all up to its end
    does so, `causal` otherwise. `context_length` is the largest number of positions.
    `extra_norms` says that the GGUF's metadata holds norms which llama.cpp's graph lacks; edgevlm's
    runtime adds them, and without it the file would answer nonsense. `n_output` is how many of the
    `n_vocab` tokens an answer can have, those that texts in `languages` need; 0 is all of them.
    `positions` are one after the other or, with M-RoPE, a time, a row and a column each: those of a
    picture's embeddings are their places in it, and what follows stands behind all of them.
    `short_context` is how many positions are turned by the GGUF's short factors; where there are
    more, all are turned by its long ones. 0 is a decoder that has one kind.
    """

    architecture: str
    attention: Attention
    n_embd: int
    n_layer: int
    n_vocab: int
    context_length: int
    extra_norms: bool = False
    n_output: int = 0
    languages: tuple[str, ...] = ()
    positions: Positions = "sequential"
    short_context: int = 0

    @property
    def outputs(self) -> int:
        """Rows of the output matrix: a logit each."""
        return self.n_output or self.n_vocab


@dataclass(frozen=True)
class AnswerSpec:
    """Stop tokens of an answer, its default length, and what is left out of it.

    With `strip`, blanks around it are no part of it, nor is a `role` ("Assistant:") that a model
    says before it. The repetition penalty counts `penalized` tokens as if the answer had them.
    After its first token no answer has one of `never`.
    """

    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    max_tokens: int = 256
    strip: bool = False
    role: str = ""
    penalized: tuple[int, ...] = ()
    never: tuple[int, ...] = ()


Finding = Literal["boxes", "points"]


@dataclass(frozen=True)
class RegionSpec:
    """The region model of a bundle, which finds objects by the decoder's last layer, not by words.

    `tasks` are those that it answers, with what it finds. After the prompt the decoder's row says
    the first object's place in `coord_bins` bins of the picture's width, the row after that the one
    along its height, and for a box the next one its width and height in `size_bins` bins of powers
    of two, 2 ** -10 to 1 of the sides; each is read as a row of its own. So it goes on until the
    likeliest token is `end`, or there are `most` objects.
    """

    tasks: Mapping[str, Finding]
    coord_bins: int
    size_bins: int
    end: int
    most: int = 50


@dataclass(frozen=True)
class TensorLocation:
    """Location of the token-embedding table in its GGUF file, so that single rows can be read.

    `offset` is in bytes from the start of the file, `type` a ggml type name such as "Q6_K", the
    shape is [rows, width].
    """

    offset: int
    type: str
    rows: int
    width: int


@dataclass(frozen=True)
class TextSpec:
    """A dual encoder's texts: text -> ids int64 [n, tokens] -> unit rows float32 [n, width], and
    the score of a picture and a text.

    A text becomes the ids `begin`, its own as many as there is room for, and `end`, at most
    `tokens`. `pad` fills them up to `tokens`, on the `pad_side`, where the tower reads every
    position; None leaves them as they are. `clean` is done before: "lower" is lower case, "siglip"
    and "canonicalize" are that without punctuation, the one deleting "_", the other making it a
    space; "" does nothing.
    A score is `scale` times the cosine plus `bias`; with `sigmoid` each label is judged by itself,
    without they share 1. `template` is what a label is put into where the user says nothing.
    """

    tokens: int
    width: int
    scale: float
    bias: float = 0.0
    sigmoid: bool = False
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    pad: int | None = None
    pad_side: Literal["left", "right"] = "right"
    clean: Clean = ""
    template: str = "{}"
