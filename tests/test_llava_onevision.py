"""LLaVA-OneVision in transformers' layouts, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.image.plan import among, plan
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.types import Reply
from tests.answers import greedy, sequence
from tests.anyres_reference import Original, Picture
from tests.checkpoints.llava_onevision import PINPOINTS, SIZE, write_onevision
from tests.checkpoints.saved_by_5 import as_saved_by_5

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(6)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
# With what Qwen2's tokenizers compose first.
WORDS = "what is in 2024's picture? опиши 图片 cafe\u0301"
VARIANTS: dict[str, dict[str, Any]] = {
    "0.5b": {"chat": "onevision"},
    "7b": {
        "chat": "chatml",
        "tied": False,
        "shards": 2,
        "dtype": "bfloat16",
        "layout": "hf-4.52",
        "most": 9,
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onevision") / request.param
    return write_onevision(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint, "LlavaOnevision")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "llava_onevision" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


CASES: dict[str, tuple[list[Exchange], list[Picture]]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE]),
    "tall": ([Exchange(WORDS, 1)], [TALL]),
    "small": ([Exchange(WORDS, 1)], [SMALL]),
    "newlines": ([Exchange("\n\na", 1)], [WIDE]),
    # Not cut: each in the middle of a square of the mean colour.
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL]),
    "none": ([Exchange(WORDS)], []),
    "turns": ([Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS)], [TALL]),
    "two in turns": ([Exchange("one", 1, "a cat"), Exchange(WORDS, 1)], [TALL, WIDE]),
    # What the model said is tokenized anew with the texts around it.
    "reply": (
        [Exchange("one", 1, Reply("\n cafe\u0301", (5, 6), "stop")), Exchange(WORDS)],
        [WIDE],
    ),
}


def chat(original: Original, exchanges: list[Exchange], system: str | None = None) -> str:
    """A conversation as the checkpoint's chat template writes it up to an answer."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for exchange in exchanges:
        pictures: list[dict[str, str]] = [{"type": "image"}] * exchange.n_pictures
        asked = [*pictures, {"type": "text", "text": exchange.question}]
        messages.append({"role": "user", "content": asked})
        if exchange.answer is not None:
            said = {"type": "text", "text": str(exchange.answer)}
            messages.append({"role": "assistant", "content": [said]})
    written = original.processor.apply_chat_template(messages, add_generation_prompt=True)
    return str(written)


@pytest.mark.parametrize("case", CASES)
def test_a_system_message_stands_where_the_chat_template_writes_it(
    vlm: VLM, original: Original, case: str
) -> None:
    exchanges, pictures = CASES[case]
    words = "You are terse. cafe\u0301 {prompt}"
    request = prepare(vlm.engines, exchanges, pictures, Sampling(), words)
    inputs = original.inputs(chat(original, exchanges, words), pictures)
    assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_transformers(vlm: VLM, original: Original, case: str) -> None:
    exchanges, pictures = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=16))
    inputs = original.inputs(chat(original, exchanges), pictures)
    assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


def test_a_picture_alone_is_not_the_one_among_others(vlm: VLM) -> None:
    alone = vlm.ask("x", TALL, max_tokens=1).tokens
    both = vlm.ask("x", [TALL, WIDE], max_tokens=1).tokens
    assert alone.tiles > 2 == both.tiles and both.image == 2 * (vlm.manifest.image.tokens + 1)
    again = vlm.ask("x", TALL, max_tokens=1).tokens
    assert again.image == alone.image <= again.cached


def test_a_large_map_is_shrunk(vlm: VLM) -> None:
    tiles = vlm.manifest.image.tiles
    assert tiles and tiles.map and tiles.map.most in (2, 9)
    # Of at most nine tiles, as many as the second model may have.
    assert (plan(4000, 3000, vlm.manifest.image).shrunk is not None) == (tiles.map.most == 2)


def test_an_earlier_layer(tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source", config={"vision_feature_layer": -2})
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in made.manifest.parity)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_with_fewer_tiles_it_answers_like_transformers_with_fewer_pinpoints(
    bundle: Path, original: Original, most: int
) -> None:
    fewer = [[h, w] for h, w in PINPOINTS if h * w // SIZE**2 < most]
    with edgevlm.load(bundle, max_tiles=most) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling(max_tokens=4))
        assert request.n_tiles <= most
        if not fewer:
            assert (request.n_tiles, request.n_image) == (1, vlm.manifest.image.tokens + 1)
            return
        config, pictures = original.model.config, original.processor.image_processor
        before = config.image_grid_pinpoints
        config.image_grid_pinpoints = pictures.image_grid_pinpoints = fewer
        try:
            inputs = original.inputs(chat(original, [Exchange(WORDS, 1)]), [WIDE])
            assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()
            ours, tokens = greedy(vlm, request, 4)
            assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3
        finally:
            config.image_grid_pinpoints = pictures.image_grid_pinpoints = before


def test_the_prompt_of_its_training(tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source")
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", template="qwen_1_5"
    )
    assert all(s.ok for s in made.manifest.parity)
    original = Original(source, "LlavaOnevision")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
        f"{WORDS}<|im_end|>\n<|im_start|>assistant\n"
    )
    with edgevlm.load(made.folder) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling())
        ids = original.inputs(text, [WIDE])["input_ids"][0].tolist()
        assert sequence(request, original.image_token) == ids


def test_a_checkpoint_without_a_chat_template_is_asked_as_the_published(tmp_path: Path) -> None:
    found = [
        inspect_source(write_onevision(tmp_path / str(chat), chat=chat)).prompt
        for chat in (None, "onevision")
    ]
    assert found[0] == found[1]


def test_a_chat_template_of_another_kind_is_noted(tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source", chat="{{ messages }}")
    model = inspect_source(source)
    assert model.notes == (
        "chat_template.json: its chat_template has no <|im_start|> and is not followed",
    )


def test_another_chat_template_is_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    chat = "{{ '<|im_start|>system\\nBe kind.<|im_end|>' }}{{ messages[0]['content'] }}"
    source = write_onevision(tmp_path / "source", chat=chat)
    with pytest.raises(SourceError, match="chat_template.json: its chat_template is not known"):
        inspect_source(source)
    inspect_source(source, ReadOptions(template="onevision"))


@pytest.mark.parametrize(("layout", "chat"), [("hf", None), ("hf-5", "chatml")])
def test_saved_by_transformers_5(layout: str, chat: str | None, tmp_path: Path) -> None:
    source = as_saved_by_5(write_onevision(tmp_path / "source", layout=layout, chat=chat))
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in bundle.manifest.parity) and len(bundle.manifest.parity) >= 8


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_quantized_it_stays_within_its_bounds(quant: str, tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source", tied=False)
    made = export_bundle(source, tmp_path / "out", quant=quant, vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {"vision_aspect_ratio": "anyres"}}, "vision_aspect_ratio is 'anyres'"),
        ({"nested": {"vision_aspect_ratio": "anyres_max_4"}}, "vision_aspect_ratio is .*config"),
        ({"nested": {"num_image_tokens": 63}}, "num_image_tokens is 63"),
        ({"config": {"vision_feature_select_strategy": "default"}}, "only 'full' is known"),
        ({"config": {"projector_hidden_act": "relu"}}, "projector_hidden_act is 'relu'"),
        ({"config": {"multimodal_projector_bias": False}}, "multimodal_projector_bias is False"),
        ({"config": {"vision_feature_layer": [-2, -1]}}, "vision_feature_layer"),
        ({"config": {"vision_feature_layer": -4}}, "vision_feature_layer -4 is not one"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "only siglip_vision_model"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ({"text_config": {"model_type": "llama"}}, "the decoder is a 'llama'"),
        ({"processor": {"size": {"height": 64, "width": 64}}}, "size is .*takes 32"),
        ({"processor": {"image_grid_pinpoints": [[32, 48]]}}, "config.json has"),
        ({"processor": {"image_mean": 2.0}}, "image_mean is 2.0"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_onevision(tmp_path / "source", **options))


def test_choices_that_it_does_not_have(tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source")
    with pytest.raises(SourceError, match="one fit of pictures"):
        inspect_source(source, ReadOptions(image_fit="pad"))
    with pytest.raises(SourceError, match="vision_heads cannot be set"):
        inspect_source(source, ReadOptions(settings={"vision_heads": "2"}))
    write_onevision(tmp_path / "own", layout="own", tower="folder")
    with pytest.raises(SourceError, match="own vision tower was trained with it"):
        inspect_source(source, ReadOptions(vision_tower=tmp_path / "own-siglip"))
    with pytest.raises(SourceError, match="not one of onevision, chatml, qwen_1_5"):
        inspect_source(source, ReadOptions(template="hf"))


def test_several_pictures_are_padded_with_the_mean_whatever_is_normalised(tmp_path: Path) -> None:
    source = write_onevision(tmp_path / "source", processor={"do_normalize": False})
    spec = among(inspect_source(source).image, 2)
    assert (spec.fit, spec.fill, spec.mean) == ("pad", (127, 127, 127), (0, 0, 0))
