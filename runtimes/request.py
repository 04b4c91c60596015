"""Turns exchanges and pictures into the blocks that the decoder reads, every stage timed.

Pictures become image embeddings (encoder, projector, cache), texts token embeddings (tokenizer,
embedding table); both are joined in the order of the model's template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgevlm.errors import ContextOverflow, PromptError
from edgevlm.films import with_films
from edgevlm.image import ImageSource
from edgevlm.image.overlap import for_projector
from edgevlm.image.plan import plan
from edgevlm.manifest import Manifest
from edgevlm.prompt import (
    Begin,
    Exchange,
    Image,
    Segment,
    Tokens,
    conversation,
    laid_out,
)
from edgevlm.runtimes import regions
from edgevlm.runtimes.bitmaps import Bitmap, ShownSource
from edgevlm.runtimes.engines import Block
from edgevlm.runtimes.fitting import fps_that_fits
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.joining import join
from edgevlm.runtimes.model import Engines, Stopwatch
from edgevlm.runtimes.places import Reel, placed
from edgevlm.runtimes.regions import Search
from edgevlm.runtimes.views import Views, check_number, kinds, views
from edgevlm.sampling import Sampling
from edgevlm.specs import Attention, ImageSpec
from edgevlm.types import Progress

Float = npt.NDArray[np.float32]

# Tiles in one run of the graphs; between two runs an answer can be cancelled. For 13 tiles of
# SmolVLM-256M on two cores 1, 2 and 4 took the same time, and 605, 688 and 853 MiB of memory.
_TILES_AT_ONCE = 1

# Makes a call of an engine; the second call ends it.
Run = Callable[[Callable[[], Float], Callable[[], None]], Float]


@dataclass
class Request:
    """A checked request: the segments of its input in order.

    `pictures`, frames of videos among them, are there until they are embeddings; `sizes` are their
    widths and heights, `sources` what they were read from, `specs` what each is planned by, `reels`
    those that are pairs of a video's frames, `n_tiles` the squares that the encoder sees of them.
    `n_image` and `n_text` count rows; `max_tokens` is the room for the answer that the context
    leaves, or less; `n_cached` and `n_kept` are counted when the input is made and read. `progress`
    is told of every tile. `searches` are those for objects, with the segments of each, where a
    region model answers; `segments` are then the first one's, and `n_text` is the longest's.
    """

    pictures: list[Bitmap]
    segments: list[Image | Tokens]
    sampling: Sampling
    watch: Stopwatch
    specs: tuple[ImageSpec, ...]
    n_tiles: int
    n_image: int
    n_text: int
    max_tokens: int
    n_cached: int = 0
    n_kept: int = 0
    reels: tuple[Reel, ...] = ()
    progress: Callable[[Progress], None] | None = None
    searches: tuple[tuple[Search, list[Image | Tokens]], ...] = ()
    sizes: tuple[tuple[int, int], ...] = field(init=False)
    sources: tuple[ImageSource | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = tuple(p.size for p in self.pictures)
        self.sources = tuple(p.source for p in self.pictures)


def prepare(
    model: Engines,
    exchanges: Sequence[Exchange],
    images: Sequence[ShownSource],
    sampling: Sampling,
    system: str | None = None,
) -> Request:
    """Reads the pictures, tokenizes the texts and checks that all of it fits.

    `images`, pictures and videos, are those of all exchanges in order, the last exchange has no
    answer yet; `system` is the system message. Raises ImageError, PromptError or ContextOverflow.
    """
    watch = Stopwatch()
    spec = model.manifest
    _ = model.decoder  # says so where there is none, before anything else does
    check_system(spec, system)
    exchanges = kinds(spec, exchanges, images)
    prompts = regions.prompts(spec.regions, exchanges[-1].question, sampling)
    asked = [[*exchanges[:-1], replace(exchanges[-1], question=prompt)] for prompt in prompts]
    filled = [conversation(spec.prompt, each, system) for each in asked]
    check_number(spec, images)
    with watch.timed("image_decode_ms"):
        shown = model.read(images)
    seen = views(spec, shown)
    plans, layout = seen.plans, spec.prompt.picture
    bare = [i for reel in seen.reels for i in reel.pictures]
    written = [
        laid_out(with_films(segments, seen.spans, seen.films), plans, layout, bare)
        for segments in filled
    ]
    n_image, n_tiles = sum(p.rows for p in plans), sum(p.n_tiles for p in plans)
    context = spec.decoder.context_length
    try:
        tokenized = [[_tokenized(model, s) for s in segments] for segments in written]
    except ContextOverflow as e:
        raise ContextOverflow(n_image, e.text, 1, context, n_tiles) from None
    read = [[s for s in segments if s != Tokens(())] for segments in tokenized]
    # Of several searches the longest has to fit; each begins where the last one did.
    n_text = max(sum(len(s.ids) for s in p if isinstance(s, Tokens)) for p in read)
    found = regions.searches(spec.regions, prompts, [picture.size for picture in seen.pictures])
    wanted = regions.longest(spec.regions, found, sampling) or sampling.longest(spec.answer)
    if n_image + n_text + 1 > context:
        raise _overflow(model, seen, n_image, n_text, wanted)
    room = min(wanted, context - n_image - n_text)
    if model.budget:
        model.budget.check(n_image + n_text + room)
    made = Request(
        seen.pictures, read[0], sampling, watch, seen.specs, n_tiles, n_image, n_text, room
    )
    return replace(made, reels=seen.reels, searches=tuple(zip(found, read, strict=False)))


def _overflow(
    model: Engines, seen: Views, n_image: int, n_text: int, wanted: int
) -> ContextOverflow:
    """The error of what does not fit, with what would, where there is a video."""
    context, tiles = model.manifest.decoder.context_length, sum(p.n_tiles for p in seen.plans)
    fps = fps_that_fits(model, seen, n_image + n_text, wanted)
    native = any(spec.native for spec in seen.specs)
    return ContextOverflow(n_image, n_text, 1, context, tiles, native=native, fps=fps)


def check_system(spec: Manifest, system: str | None) -> None:
    """Raises PromptError for a system message that the model cannot be given."""
    if system is not None and not spec.prompt.system_template:
        raise PromptError(
            f"{spec.name}: its prompt template has no system message (or the bundle is older than "
            "those; export it again); say it in the question"
        )
    if system is not None and not system.strip():
        raise PromptError("the system message is empty; leave it out")


def _tokenized(model: Engines, segment: Segment) -> Image | Tokens:
    if isinstance(segment, Image | Tokens):
        return segment
    ids = [model.decoder.bos] if isinstance(segment, Begin) else model.tokenize(segment.text)
    return Tokens(tuple(ids))


def prefill(model: Engines, request: Request, blocks: Sequence[Block], room: int) -> None:
    """The decoder reads the input; rows that it did not read again count as cached."""

    def told(done: int, total: int) -> None:
        if request.progress and total:
            request.progress(Progress("prefill", done, total, "tokens"))

    recall = model.prefixes.recall(blocks) if model.prefixes else None
    model.turn_to(model.decoder)
    request.n_kept = interruptible(
        lambda: model.decoder.prefill(blocks, room=room, recall=recall, told=told),
        model.decoder.cancel,
    )
    request.n_cached = max(request.n_cached, request.n_kept)


def input_blocks(model: Engines, request: Request) -> list[Block]:
    """The decoder's input. Runs the encoder where needed, and lets the pictures go."""
    return joined(model, request, embedded(model, request))


def embedded(model: Engines, request: Request) -> list[Float]:
    """The embeddings of each picture, which are let go. Runs the encoder where needed."""
    found = [
        _embedded(model, request, picture, spec)
        for picture, spec in zip(request.pictures, request.specs, strict=True)
    ]
    request.pictures.clear()
    return found


def joined(model: Engines, request: Request, embeddings: Sequence[Float]) -> list[Block]:
    """The input with the embeddings float32 [rows, n_embd] of each picture in their places.

    All of it is one bidirectional block in a prefix-LM. Elsewhere it is causal and cut around the
    pictures: other questions begin with the same words, and with the same pictures after them. With
    the attention "blocks" every tile is a bidirectional block of its own, with "opening" all up to
    the end of the pictures is one.
    """
    with request.watch.timed("prefill_ms"):
        rows = [
            embeddings[s.index][s.begin : s.end]
            if isinstance(s, Image)
            else model.decoder.embed(s.ids)
            for s in request.segments
        ]
    spec, segments = model.manifest.decoder, request.segments
    cells = None
    if spec.positions == "mrope":
        seen = zip(request.sizes, request.specs, strict=True)
        cells = [plan(*size, image).cells for size, image in seen]
    positions = placed(segments, rows, cells, request.reels)
    blocks: list[Block] = []
    cuts = _cuts(segments, spec.attention, request.reels)
    for begin, end in pairwise([0, *cuts, len(rows)]):
        if begin < end:
            picture = any(isinstance(segment, Image) for segment in segments[begin:end])
            both = spec.attention == "prefix" or (spec.attention != "causal" and picture)
            together, places = np.concatenate(rows[begin:end]), np.concatenate(positions[begin:end])
            blocks.append(Block(together, "bidirectional" if both else "causal", places))
    return blocks


def _cuts(
    segments: Sequence[Image | Tokens], attention: Attention, reels: Sequence[Reel]
) -> list[int]:
    """Indices of the segments before which a block ends."""
    if attention == "blocks":
        tiles = [i for i, segment in enumerate(segments) if isinstance(segment, Image)]
        return [cut for i in tiles for cut in (i, i + 1)]
    if attention == "opening":
        return [i + 1 for i, segment in enumerate(segments) if isinstance(segment, Image)][-1:]
    return [] if attention == "prefix" else _around_pictures(segments, reels)


def _around_pictures(segments: Sequence[Image | Tokens], reels: Sequence[Reel]) -> list[int]:
    """Indices of the segments at which a picture, with the texts between its tiles, or a reel
    begins or has ended.
    """
    first = {i: reel.pictures[0] for reel in reels for i in reel.pictures}
    ends: dict[int, list[int]] = {}
    for i, segment in enumerate(segments):
        if isinstance(segment, Image):
            ends.setdefault(first.get(segment.index, segment.index), [i, i + 1])[1] = i + 1
    return [cut for both in ends.values() for cut in both]


def _embedded(model: Engines, request: Request, picture: Bitmap, spec: ImageSpec) -> Float:
    rows, was_known = embeddings(model, picture, spec, request.watch, request.progress)
    request.n_cached += len(rows) if was_known else 0
    return rows


def embeddings(
    model: Engines,
    picture: Bitmap,
    image: ImageSpec,
    watch: Stopwatch,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Float, bool]:
    """A picture's image embeddings float32 [rows, n_embd], the cache's own, and whether they were
    remembered.
    """
    with watch.timed("preprocess_ms"):
        key = picture.key(image)
        known = model.known(picture, image)
    while picture.took:
        stage, ms = picture.took.popitem()
        watch.ms[stage] += ms
    if known is not None:
        return known, True
    rows = picture.made.pop(key, None)
    if rows is None:
        rows = encode(model, picture, image, watch, progress)
    model.cache.put(key, rows)
    return rows, False


def encode(
    model: Engines,
    picture: Bitmap,
    image: ImageSpec,
    watch: Stopwatch,
    progress: Callable[[Progress], None] | None = None,
    run: Run = interruptible,
) -> Float:
    """A picture -> image embeddings float32 [rows, n_embd], as its plan joins those of its tiles.

    Tiles go through the graphs a few at a time, each different one once.
    """
    with watch.timed("preprocess_ms"):
        pixels = picture.cut(image)
        names = [hashlib.sha256(tile).digest() for tile in pixels]
        first = {name: names.index(name) for name in names}
    encoder, made = model.encoder, list[Float]()
    apart = image.tiles is None or image.tiles.rule != "overlap"
    order = {name: i for i, name in enumerate(first)}

    def project(features: Float) -> list[Float]:
        with watch.timed("projector_ms"):
            return list(run(partial(encoder.project, features), encoder.cancel))

    def in_order() -> Float:
        return np.stack([made[order[name]] for name in names])

    model.turn_to(encoder)
    if progress:
        progress(Progress("vision", 0, len(first), "tiles"))
    for at in range(0, len(first), _TILES_AT_ONCE):
        tiles = pixels[list(first.values())[at : at + _TILES_AT_ONCE]]
        with watch.timed("vision_ms"):
            features = run(partial(encoder.features, tiles), encoder.cancel)
        made += project(features) if apart else list(features)
        if progress:
            progress(Progress("vision", len(made), len(first), "tiles"))
    if not apart:
        return project(for_projector(in_order(), picture.size, image))[0]
    return join(in_order(), picture.plan(image), model.newline)
