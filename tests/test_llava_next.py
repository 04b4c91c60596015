"""LLaVA-NeXT in both layouts, against transformers and LLaVA's own code written anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.benchmarks.latency.measure import endless
from edgevlm.bundle import NEWLINE, record
from edgevlm.errors import BundleCorrupt, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source, requantize_bundle
from edgevlm.image.plan import limited, plan
from edgevlm.manifest import write_manifest
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.anyres_reference import Original, Picture
from tests.checkpoints.adapters import shapes_of, write_adapter
from tests.checkpoints.llava_next import PINPOINTS, SIZE, write_next
from tests.checkpoints.saved_by_5 import as_saved_by_5

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
WORDS = "what is in 2024's picture? опиши 图片"
MISTRAL: dict[str, Any] = {
    "kv_heads": 2,
    "text_config": {
        "model_type": "mistral",
        "rope_theta": 1e6,
        "sliding_window": None,
        "max_position_embeddings": 32768,
    },
}
LLAMA3: dict[str, Any] = {
    "vocabulary": "llama3",
    "kv_heads": 2,
    "text_config": {"rope_theta": 5e5},
}
SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
# A checkpoint, and its conversation: before it, a question and what comes after it, answer's end.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, str, str, str]]] = {
    "vicuna": (
        {},
        (
            "A chat between a curious human and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the human's questions. ",
            "USER: ",
            " ASSISTANT:",
            "</s>",
        ),
    ),
    "mistral": (
        {**MISTRAL, "layout": "hf-4.52", "shards": 2, "dtype": "bfloat16"},
        ("", "[INST] ", " [/INST]", " </s>"),
    ),
    "mistral-not-legacy": ({**MISTRAL, "legacy": False}, ("", "[INST] ", " [/INST]", " </s>")),
    "llama3": (
        {**LLAMA3, "layout": "hf"},
        (
            f"<|start_header_id|>system<|end_header_id|>\n\n{SEEING}<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ),
}


# A system message as the published chat templates write it, LLaMA-3's as the model's card does.
SYSTEMS = {
    "vicuna": "{} ",
    "mistral": "<<SYS>>\n{}\n<</SYS>>\n\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
}


@pytest.fixture(scope="module", params=VARIANTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_next(tmp_path_factory.mktemp("next") / name, **VARIANTS[name][0])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint, "LlavaNext")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "llava_next" and all(s.ok for s in made.manifest.parity)
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
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL]),
    "none": ([Exchange(WORDS)], []),
    "turns": (
        [Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS, 1)],
        [TALL, WIDE],
    ),
}


def chat(name: str, exchanges: list[Exchange]) -> str:
    """A conversation as the model's card and LLaVA's conversation.py write it."""
    text, asks, answers, ends = VARIANTS[name][1]
    for exchange in exchanges:
        text += asks + "<image>\n" * exchange.n_pictures + exchange.question + answers
        if exchange.answer is not None:
            space = "" if answers.endswith("\n") else " "
            text += f"{space}{exchange.answer}{ends}"
    return text


@pytest.mark.parametrize("case", CASES)
def test_a_system_message_stands_where_the_chat_template_writes_it(
    vlm: VLM, original: Original, name: str, case: str
) -> None:
    exchanges, pictures = CASES[case]
    text = chat(name, exchanges)
    before = VARIANTS[name][1][0]
    text = SYSTEMS[name.partition("-")[0]].format("You are terse. {}") + text[len(before) :]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(), "You are terse. {}")
    inputs = original.inputs(text, pictures)
    assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_transformers(vlm: VLM, original: Original, name: str, case: str) -> None:
    exchanges, pictures = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=16))
    inputs = original.inputs(chat(name, exchanges), pictures)
    assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("most", [1, 3, 4])
def test_with_fewer_tiles_it_answers_like_transformers_with_fewer_pinpoints(
    bundle: Path, original: Original, name: str, most: int
) -> None:
    fewer = [[h, w] for h, w in PINPOINTS if h * w // SIZE**2 < most]
    with edgevlm.load(bundle, max_tiles=most) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling(max_tokens=4))
        assert request.n_tiles <= most
        if not fewer:
            assert (request.n_tiles, request.n_image) == (1, vlm.manifest.image.tokens + 1)
            greedy(vlm, request, 4)
            return
        config, pictures = original.model.config, original.processor.image_processor
        before = config.image_grid_pinpoints
        config.image_grid_pinpoints = pictures.image_grid_pinpoints = fewer
        try:
            inputs = original.inputs(chat(name, [Exchange(WORDS, 1)]), [WIDE])
            assert sequence(request, original.image_token) == inputs["input_ids"][0].tolist()
            ours, tokens = greedy(vlm, request, 4)
            assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3
        finally:
            config.image_grid_pinpoints = pictures.image_grid_pinpoints = before


def test_a_picture_in_a_later_turn(vlm: VLM) -> None:
    vlm.ask("a context of the size of both", [WIDE, WIDE, TALL], max_tokens=1)
    first = vlm.ask("one", WIDE, max_tokens=3)
    asked: Any = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, text("one")]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image", "image": TALL}, text("two")]},
    ]
    reply = vlm.ask(asked, max_tokens=2)
    assert reply.tokens.tiles > first.tokens.tiles and reply.tokens.kept > first.tokens.image


def text(words: str) -> Any:
    return {"type": "text", "text": words}


def test_image_embeddings_are_known_before_they_are_computed(vlm: VLM) -> None:
    for picture in (WIDE, TALL, SMALL):
        height, width = picture.shape[:2]
        planned = plan(width, height, vlm.manifest.image)
        assert vlm.image_embeddings(picture).shape == (planned.rows, vlm.manifest.decoder.n_embd)
        reply = vlm.ask("x", picture, max_tokens=1)
        assert (reply.tokens.image, reply.tokens.tiles) == (planned.rows, planned.n_tiles)


# LLaVA's own layout.
OWN: dict[str, dict[str, Any]] = {
    "vicuna": {},
    "bin": {"weights": "bin", "shards": 3, "dtype": "bfloat16"},
    "mistral": {
        "model_type": "llava_mistral",
        "kv_heads": 2,
        "config": {"image_grid_pinpoints": str([tuple(p) for p in PINPOINTS])},
    },
    "llama3": LLAMA3,
    "first-name": {"model_type": "llava"},
    "most": {
        "config": {"image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": "(1x1),...,(3x3)"}
    },
}
OPENINGS = {
    "vicuna": "A chat between a curious human",
    "mistral": "[INST] ",
    "llama3": SEEING,
}


@pytest.mark.parametrize("name", OWN)
def test_its_own_layout_answers_like_the_original(name: str, tmp_path: Path) -> None:
    source = write_next(tmp_path / name, layout="own", **OWN[name])
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    parity = {s.stage: s for s in bundle.manifest.parity}
    assert parity["prompt"].worst == parity["pixels"].worst == parity["greedy"].worst == 0
    assert parity["answer"].worst < 1e-3 and bundle.manifest.family == "llava_next"
    assert OPENINGS.get(name, "") in "".join(bundle.manifest.prompt.template)
    with edgevlm.load(bundle.folder) as vlm:
        if name == "most":
            assert plan(4000, 3000, vlm.manifest.image).shrunk
        assert vlm.ask("x", TALL, max_tokens=2).tokens.tiles > 1


def test_both_layouts_lay_a_small_square_their_own_way(tmp_path: Path) -> None:
    found = [
        inspect_source(write_next(tmp_path / layout, layout=layout)).image
        for layout in ("hf", "own")
    ]
    assert [plan(20, 20, image).grid for image in found] == [(1, 2), (2, 1)]


@pytest.mark.parametrize("options", [{}, {"layout": "hf-5", **MISTRAL}, {**LLAMA3}])
def test_saved_by_transformers_5(options: dict[str, Any], tmp_path: Path) -> None:
    source = as_saved_by_5(write_next(tmp_path / "source", **options))
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in bundle.manifest.parity) and len(bundle.manifest.parity) >= 8


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "iq4_xs"])
def test_quantized_it_stays_within_its_bounds(quant: str, tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", **MISTRAL)
    made = export_bundle(source, tmp_path / "out", quant=quant, vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)
    # Whatever the precision, the newline is the checkpoint's.
    newline = np.load(made.folder / NEWLINE)
    assert newline.dtype == np.float32 and newline.std() > 0.5


def test_requantized_it_keeps_its_newline(tmp_path: Path) -> None:
    source = write_next(tmp_path / "source")
    made = export_bundle(source, tmp_path / "a", quant="f16", vision_precision="fp16", verify=False)
    other = requantize_bundle(made.folder, tmp_path / "b", quant="f16", vision_precision="int8")
    assert (other.folder / NEWLINE).read_bytes() == (made.folder / NEWLINE).read_bytes()
    assert all(s.ok for s in other.manifest.parity)


def test_a_newline_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", layers=1)
    made = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    manifest, path = made.manifest, made.folder / NEWLINE
    projector = manifest.components["projector"]

    def stating(*files: Any) -> None:
        parts = {**manifest.components, "projector": replace(projector, files=files)}
        write_manifest(made.folder, replace(manifest, components=parts))

    stating(projector.files[0])
    with pytest.raises(BundleCorrupt, match="names no newline"):
        edgevlm.load(made.folder)
    for wrong, says in (
        (np.zeros(256, np.float64), "256 numbers in float32"),
        (np.zeros(255, np.float32), "256 numbers in float32"),
        (np.full(256, np.nan, np.float32), "not a number"),
        (np.array([{}]), "cannot be read"),
    ):
        np.save(path, wrong)
        stating(projector.files[0], record(path))
        with pytest.raises(BundleCorrupt, match=says):
            edgevlm.load(made.folder)


ODD = {"image_grid_pinpoints": [[33, 64]]}
FULL = {"vision_feature_select_strategy": "full"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {"image_grid_pinpoints": [[32, 64]]}}, "image_grid_pinpoints is .*config.json"),
        ({"processor": ODD, "config": ODD}, "multiples of 32"),
        ({"processor": {"crop_size": {"height": 16, "width": 16}}}, "crop_size .*takes 32"),
        ({"processor": {"size": {"shortest_edge": 64}}}, "size is .*takes 32"),
        ({"processor": {"do_resize": False}}, "do_resize is False"),
        ({"processor": {"aspect_ratio_setting": "pad"}}, "aspect_ratio_setting is 'pad'"),
        ({"processor": {"image_processor_type": "CLIPImageProcessor"}}, "only LlavaNextImage"),
        ({"nested": {"patch_size": 8}}, "patch_size 8"),
        ({"config": FULL, "nested": FULL}, "class token"),
        ({"config": {"use_image_newline_parameter": False}}, "image_newline_parameter is False"),
        ({"config": {"projector_hidden_act": "relu"}}, "projector_hidden_act 'relu'"),
        ({"newline": False}, "lacks the tensor for projector.image_newline"),
        ({"newline": False, "layout": "own"}, "lacks the tensor for projector.image_newline"),
        ({"layout": "own", "projector": "ldpnet"}, "projector is 'ldp'"),
        ({"layout": "own", "model_type": "palo"}, "image_aspect_ratio 'anyres'"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_next(tmp_path / "source", layers=1, **options))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"image_aspect_ratio": "anyres_x"}, "image_aspect_ratio 'anyres_x'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_vision_select_feature": "cls_patch"}, "class token"),
        ({"image_grid_pinpoints": "wide"}, "image_grid_pinpoints is 'wide'"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is None"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is \\[\\]"),
        ({"image_grid_pinpoints": [[32]]}, "multiples of 32"),
        ({"image_grid_pinpoints": "(2x2),...,(1x1)"}, "multiples of 32"),
    ],
)
def test_what_its_own_layout_may_not_say(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_next(tmp_path / "source", layout="own", layers=1, config=config))


def test_a_plain_llava_has_no_newline(tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", layout="own", config={"image_aspect_ratio": "pad"})
    with pytest.raises(SourceError, match="image_newline is not a tensor of this model"):
        inspect_source(source)


def test_its_own_tower_stays(tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", layout="own")
    write_next(tmp_path / "other", layout="own", tower="folder")
    with pytest.raises(SourceError, match="own vision tower was trained with it"):
        inspect_source(source, ReadOptions(vision_tower=tmp_path / "other-tower"))


@pytest.mark.parametrize("layout", ["hf", "hf-5"])
def test_an_adapter_is_merged_in_every_part(layout: str, tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", layout=layout)
    shapes = shapes_of(source)
    ends = ("self_attn.q_proj.weight", "linear_1.weight")
    modules = [n.removesuffix(".weight") for n in shapes if n.endswith(ends) and ".2." not in n]
    newline = next(name for name in shapes if name.endswith("image_newline"))
    adapter = write_adapter(tmp_path / "adapter", shapes, modules, whole=[newline])
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", adapter=adapter
    )
    assert all(s.ok for s in made.manifest.parity)
    plain = export_bundle(source, tmp_path / "plain", quant="f16", verify=False)
    assert not np.allclose(np.load(made.folder / NEWLINE), np.load(plain.folder / NEWLINE))


def test_a_limit_chooses_among_what_fits(vlm: VLM) -> None:
    assert plan(110, 70, limited(vlm.manifest.image, 4)).n_tiles <= 4


def test_without_a_picture_processor_the_class_decides(tmp_path: Path) -> None:
    source = write_next(tmp_path / "source", config={"image_grid_pinpoints": None})
    (source / "preprocessor_config.json").unlink()
    found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert found["vision_config"]["image_size"] == SIZE
    # Of 336 pixels, as the published towers; these have another size.
    with pytest.raises(SourceError, match="multiples of 32"):
        inspect_source(source)


def test_a_benchmark_asks_it_as_users_do(vlm: VLM) -> None:
    asked = endless(vlm, vlm.engines.encoder).ask("x", WIDE, max_tokens=3)
    assert asked.token_ids == vlm.ask("x", WIDE, max_tokens=3).token_ids
    assert asked.tokens.image == vlm.ask("x", WIDE, max_tokens=1).tokens.image
