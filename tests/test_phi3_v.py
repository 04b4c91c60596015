"""Phi-3-Vision, against its published code written anew (phi3v_reference.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle import NEWLINE
from edgevlm.errors import ImageError, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.image import cut
from edgevlm.image.plan import limited, plan
from edgevlm.prompt import Exchange, Image
from edgevlm.runtimes.request import Request, input_blocks, prefill, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy
from tests.checkpoints.llava import ORIGINALS, write_llava
from tests.checkpoints.phi3_v import ORIGINAL, SIZE, write_phi3_v
from tests.phi3v_reference import Original

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (38, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (90, 37, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
SLIM = RNG.integers(0, 256, (5, 60, 3), np.uint8)
WORDS = "what is in 2024's picture? опиши 图片"
VARIANTS: dict[str, dict[str, Any]] = {
    "3.5": {"shards": 2, "dtype": "bfloat16"},
    "3": {
        "processor": {"num_crops": 16, "num_img_tokens": None},
        "tables": "wte",
        "spaces": "first",
        "kv_heads": 2,
    },
}
Picture = NDArray[np.uint8]
CASES: dict[str, tuple[list[Exchange], list[Picture]]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE]),
    "tall": ([Exchange(WORDS, 1)], [TALL]),
    "small": ([Exchange(WORDS, 1)], [SMALL]),
    "slim": ([Exchange(WORDS, 1)], [SLIM]),
    "newlines": ([Exchange("\n\n a\n", 1)], [WIDE]),
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL]),
    "none": ([Exchange(WORDS)], []),
    "turns": (
        [Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS, 2)],
        [TALL, WIDE, SMALL],
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi3v") / str(request.param)
    return write_phi3_v(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "phi3_v" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


def ids_of(request: Request) -> list[int]:
    """The input's token ids, every embedding of the picture N as -N."""
    ids: list[int] = []
    for segment in request.segments:
        if isinstance(segment, Image):
            rows = plan(*request.sizes[segment.index], request.specs[segment.index]).rows
            ids += [-1 - segment.index] * rows
        else:
            ids += segment.ids
    return ids


def chat(original: Original, exchanges: list[Exchange], system: str | None = None) -> str:
    """A conversation as the model's card writes it."""
    messages = [{"role": "system", "content": system}] if system else []
    seen = 0
    for exchange in exchanges:
        numbers = range(seen + 1, seen + exchange.n_pictures + 1)
        tags = "".join(f"<|image_{n}|>\n" for n in numbers)
        messages.append({"role": "user", "content": tags + exchange.question})
        if exchange.answer is not None:
            messages.append({"role": "assistant", "content": str(exchange.answer)})
        seen += exchange.n_pictures
    return original.chat(messages)


def forwards(
    original: Original, ids: list[int], tokens: list[int], pictures: list[Picture]
) -> NDArray[np.float32]:
    """The original's logits after the input and after each token. What it turned otherwise it reads
    anew, so that every length is as a forward of its own.
    """
    if (len(ids) > ORIGINAL) == (len(ids) + len(tokens) > ORIGINAL):
        return original.logits([*ids, *tokens], pictures, len(tokens) + 1)
    each = [original.logits([*ids, *tokens[:i]], pictures, 1) for i in range(len(tokens) + 1)]
    return np.concatenate(each)


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, case: str) -> None:
    exchanges, pictures = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=12))
    ids = original.input_ids(chat(original, exchanges), pictures)
    assert ids_of(request) == ids
    ours, tokens = greedy(vlm, request, 12)
    theirs = forwards(original, ids, tokens, pictures)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


def test_a_system_message_stands_where_the_chat_template_writes_it(
    vlm: VLM, original: Original
) -> None:
    for exchanges, pictures in CASES.values():
        request = prepare(vlm.engines, exchanges, pictures, Sampling(), "You are terse. {}")
        text = chat(original, exchanges, "You are terse. {}")
        assert ids_of(request) == original.input_ids(text, pictures)


@pytest.mark.parametrize("size", [(110, 38), (37, 90), (64, 64), (1, 1), (9, 300), (33, 32)])
def test_pixels_are_the_originals(vlm: VLM, original: Original, size: tuple[int, int]) -> None:
    picture = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
    theirs, (height, width) = original.pixels(picture)
    ours, planned = cut(picture, vlm.manifest.image), plan(*size, vlm.manifest.image)
    assert planned.canvas == (width, height) and len(ours) == planned.n_tiles
    # A tile that is all there is stands once; the original reads it twice.
    tiles = theirs.numpy()[-len(ours) :]
    np.testing.assert_array_equal(ours[-len(planned.tiles) :], tiles[-len(planned.tiles) :])
    # torch's own sums are rounded otherwise on processors without fused multiply-add.
    np.testing.assert_allclose(ours[0], theirs[0].numpy(), rtol=0, atol=1e-6)
    rows = vlm.image_embeddings(picture)
    assert len(rows) == planned.rows == original.num_img_tokens(picture)
    np.testing.assert_allclose(rows, original.picture_rows(picture).numpy(), atol=1e-4)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_with_fewer_tiles_it_answers_like_the_original_with_fewer_crops(
    bundle: Path, checkpoint: Path, most: int
) -> None:
    fewer = Original(checkpoint)
    fewer.num_crops = min(max(most - 1, 1), fewer.num_crops)
    with edgevlm.load(bundle, max_tiles=most) as vlm:
        for picture in (WIDE, TALL, SMALL):
            request = prepare(vlm.engines, [Exchange(WORDS, 1)], [picture], Sampling(max_tokens=4))
            assert request.n_tiles <= most
            ids = fewer.input_ids(chat(fewer, [Exchange(WORDS, 1)]), [picture])
            assert ids_of(request) == ids
            ours, tokens = greedy(vlm, request, 4)
            assert np.abs(ours - forwards(fewer, ids, tokens, [picture])).max() < 5e-3


def test_plans_are_the_originals_for_all_shapes(tmp_path: Path) -> None:
    source = write_phi3_v(tmp_path, layers=1, processor={"num_crops": 16})
    image, original = inspect_source(source).image, Original(source)
    for most in (1, 2, 3, 4, 7, 16):
        original.num_crops, spec = most, limited(image, most + 1)
        for width, height in RNG.integers(1, 120, (40, 2)).tolist():
            if max(width, height) > 30 * min(width, height):
                continue
            canvas = original.hd_transform(np.zeros((height, width, 3), np.uint8))
            planned = plan(width, height, spec)
            assert planned.canvas == canvas.size and planned.n_tiles <= most + 1
            assert planned.grid == (canvas.height // SIZE, canvas.width // SIZE)


def long_question(vlm: VLM, rows: int) -> str:
    """A question about no picture that makes an input of so many rows."""
    fixed = prepare(vlm.engines, [Exchange("a")], [], Sampling()).n_text
    words = " ".join(["a"] * (rows - fixed + 1))
    assert prepare(vlm.engines, [Exchange(words)], [], Sampling()).n_text == rows
    return words


@pytest.mark.parametrize("rows", [ORIGINAL - 12, ORIGINAL - 3, ORIGINAL, ORIGINAL + 1])
def test_long_texts_are_turned_as_the_original_turns_them(
    vlm: VLM, original: Original, rows: int
) -> None:
    exchange = [Exchange(long_question(vlm, rows))]
    ids = original.input_ids(chat(original, exchange), [])
    request = prepare(vlm.engines, exchange, [], Sampling(max_tokens=8))
    ours, tokens = greedy(vlm, request, 8)
    theirs = forwards(original, ids, tokens, [])
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3
    assert (vlm.settings.context > ORIGINAL) == (rows + 8 > ORIGINAL)


def test_a_conversation_that_grows_long_answers_as_if_it_were_read_anew(
    bundle: Path, vlm: VLM
) -> None:
    words = long_question(vlm, ORIGINAL - 40)
    with edgevlm.load(bundle) as other:
        talk, said = other.chat(), list[Exchange]()
        for question, long in ((words, False), ("b c", True), ("d", True)):
            reply = talk.ask(question, max_tokens=30)
            assert (other.settings.context > ORIGINAL) == long
            fresh = prepare(vlm.engines, [*said, Exchange(question)], [], Sampling(max_tokens=30))
            vlm.engines.decoder.clear()
            assert tuple(greedy(vlm, fresh, 30)[1])[: len(reply.token_ids)] == reply.token_ids
            said.append(Exchange(question, 0, reply))
        # Short again: nothing of the long one's cache is taken.
        first = other.ask("e", WIDE, max_tokens=6)
        assert other.settings.context <= ORIGINAL
    vlm.engines.decoder.clear()
    assert first.token_ids == vlm.ask("e", WIDE, max_tokens=6).token_ids


def test_continuations_are_scored_as_they_would_be_said(vlm: VLM, original: Original) -> None:
    words = long_question(vlm, ORIGINAL - 2)
    ids = original.input_ids(chat(original, [Exchange(words)]), [])
    texts = ["a", "a cat is on the table"]
    scores = vlm.score(words, texts)
    for text, score in zip(texts, scores, strict=True):
        tokens = vlm.engines.decoder.tokenize(text)
        theirs = forwards(original, ids, tokens, [])[:-1].astype(np.float64)
        sums = np.log(np.exp(theirs - theirs.max(1, keepdims=True)).sum(1)) + theirs.max(1)
        chosen = theirs[np.arange(len(tokens)), tokens] - sums
        assert abs(score - chosen.sum()) < 5e-3


def test_a_second_decoder_goes_on_from_the_first(bundle: Path, vlm: VLM) -> None:
    words = long_question(vlm, ORIGINAL - 4)
    expected = vlm.ask(words, max_tokens=10).token_ids
    with edgevlm.load(bundle, repack="decode") as paired:
        assert paired.ask(words, max_tokens=10).token_ids == expected


def test_prefixes_on_disk_are_those_of_short_texts(
    bundle: Path, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = long_question(vlm, ORIGINAL - 30)
    expected = vlm.ask(words, WIDE, max_tokens=4).token_ids
    short = vlm.ask("b", WIDE, max_tokens=4).token_ids
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path))
    for _ in range(2):
        with edgevlm.load(bundle) as kept:
            assert kept.ask("b", WIDE, max_tokens=4).token_ids == short
            assert kept.ask(words, WIDE, max_tokens=4).token_ids == expected


def test_an_answer_can_be_cancelled_while_it_is_read_anew(vlm: VLM) -> None:
    words = long_question(vlm, ORIGINAL - 2)
    answer = vlm.stream(words, max_tokens=10)
    pieces = [next(answer), next(answer)]
    vlm.engines.decoder.cancel()
    rest = list(answer)
    assert len(pieces) + len(rest) < 10 and answer.reply.finish_reason == "cancelled"
    assert len(vlm.ask(words, max_tokens=10).token_ids) == 10


def test_a_prompt_beyond_the_context_is_refused(vlm: VLM) -> None:
    request = prepare(vlm.engines, [Exchange("x")], [WIDE], Sampling(max_tokens=1))
    prefill(vlm.engines, request, input_blocks(vlm.engines, request), 1)
    with pytest.raises(ImageError, match="too long and narrow"):
        vlm.ask("x", np.zeros((1, 4000, 3), np.uint8))


@pytest.mark.parametrize("layout", ["own", "hf"])
def test_a_llava_on_a_phi3_for_long_texts(layout: str, tmp_path: Path) -> None:
    text = {
        "original_max_position_embeddings": ORIGINAL,
        "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 32, "long_factor": [9.0] * 32},
    }
    options: dict[str, Any] = {**ORIGINALS["llava-phi3"], "layout": layout, "text_config": text}
    source = write_llava(tmp_path / "source", **options)
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in made.manifest.parity)
    assert made.manifest.decoder.short_context == ORIGINAL


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "iq4_xs"])
def test_quantized_it_stays_within_its_bounds(quant: str, tmp_path: Path) -> None:
    source = write_phi3_v(tmp_path / "source", tables="both")
    made = export_bundle(source, tmp_path / "out", quant=quant, vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)
    # Whatever the precision, the rows between tiles are those of the float32 connector.
    between = np.load(made.folder / NEWLINE)
    assert between.dtype == np.float32 and between.shape == (2, made.manifest.decoder.n_embd)


def test_the_number_of_tiles_can_be_stated(tmp_path: Path) -> None:
    source = write_phi3_v(tmp_path / "source", layers=1)
    made = export_bundle(source, tmp_path / "out", quant="f32", settings={"num_crops": "9"})
    assert made.manifest.image.tiles and made.manifest.image.tiles.most == 9
    assert any("9 tiles at most, as stated" in note for note in made.manifest.notes)
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="state it .--set num_crops=16"):
        inspect_source(source)
    image = inspect_source(source, ReadOptions(settings={"num_crops": "16"})).image
    assert image.tiles and image.tiles.most == 16


EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
TOWER = {"name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336"}
SHORT = [1.0] * 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {"embd_layer": EMBEDDING | {"hd_transform_order": "glb_sub"}}}, "glb_sub"),
        ({"config": {"embd_layer": EMBEDDING | {"projection_cls": "linear"}}}, "projection_cls"),
        ({"config": {"embd_layer": {}}}, "embd_layer.hd_transform_order is None"),
        ({"config": {"img_processor": TOWER | {"name": "siglip"}}}, "img_processor.name"),
        ({"config": {"img_processor": TOWER | {"type_feature": "cls_patch"}}}, "type_feature"),
        ({"config": {"img_processor": TOWER | {"image_dim_out": 32}}}, "image_dim_out is 32"),
        ({"config": {"img_processor": TOWER | {"layer_idx": -9}}}, "layer_idx -9"),
        ({"config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "'yarn'"),
        ({"config": {"rope_scaling": {"type": "su", "short_factor": SHORT}}}, "long_factor is not"),
        (
            {
                "config": {
                    "rope_scaling": {
                        "type": "su",
                        "short_factor": SHORT,
                        "long_factor": SHORT,
                        "short_mscale": 1.2,
                    }
                }
            },
            "has short_mscale",
        ),
        ({"config": {"original_max_position_embeddings": 500}}, "only multiples of 256"),
        ({"processor": {"num_crops": 0}}, "num_crops is 0"),
        (
            {"processor": {"image_processor_type": "CLIPImageProcessor", "auto_map": None}},
            "only Phi3VImage",
        ),
        ({"processor": {"do_resize": False}}, "do_resize"),
        ({"size": 36}, "has 9 patches a side"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says) as raised:
        inspect_source(write_phi3_v(tmp_path, layers=1, **options))
    assert "\n" not in str(raised.value)
