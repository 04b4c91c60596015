"""Qwen2-VL and Qwen2.5-VL, against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.errors import ContextOverflow, EngineError, ImageError, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.export.parity.quiet import quiet
from edgevlm.prompt import Exchange
from edgevlm.runtimes.engines import Cancelled, Float, Int32
from edgevlm.runtimes.llama.context import Context
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.checkpoints.qwen2_vl import CHAT_TEMPLATE, write_qwen2_vl

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (38, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (90, 37, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
LARGE = RNG.integers(0, 256, (260, 190, 3), np.uint8)
# With decomposed accents, which the tokenizer composes.
WORDS = "what is in 2024's cafe\u0301? опиши и\u0306 图片"
VARIANTS: dict[str, dict[str, Any]] = {
    "2": {},
    "2-saved": {"nested": True, "mrope": "default", "tied": False, "shards": 2},
    "2.5": {"new": True, "dtype": "bfloat16", "shards": 2, "chat": None},
    "2.5-saved": {
        "new": True,
        "nested": True,
        "files": "pair",
        "tied": False,
        "window": 24,
        "full_layers": (0, 2),
    },
}
Picture = NDArray[np.uint8]
Turns = list[tuple[int, str]]


class Original:
    """The checkpoint in transformers' own classes."""

    def __init__(self, folder: Path, max_pixels: int = 0) -> None:
        from edgevlm.export.parity.references.qwen2_vl import load, processor

        self.model = load(folder)
        self.processor = processor(folder, max_pixels)
        self.processor.chat_template = CHAT_TEMPLATE
        self.token: int = self.model.config.image_token_id

    def inputs(self, turns: Turns, pictures: Sequence[Picture], system: str | None = None) -> Any:
        """A conversation: of each question the number of pictures and the words, answers between
        them.
        """
        messages = [
            {
                "role": ("user", "assistant")[i % 2],
                "content": [{"type": "image"}] * n + [{"type": "text", "text": said}],
            }
            for i, (n, said) in enumerate(turns)
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        with quiet():
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            return self.processor(text=text, images=list(pictures) or None, return_tensors="pt")

    def logits(self, inputs: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)]).long()], 1)
        given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        with torch.inference_mode():
            out = self.model(input_ids=ids, **given)
        rows: NDArray[np.float32] = out.logits[0, -len(tokens) - 1 :].numpy()
        return rows


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / request.param
    return write_qwen2_vl(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "qwen2_vl" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


CASES: dict[str, tuple[Turns, list[Picture]]] = {
    "wide": ([(1, WORDS)], [WIDE]),
    "tall": ([(1, WORDS)], [TALL]),
    "small": ([(1, WORDS)], [SMALL]),
    "large": ([(1, WORDS)], [LARGE]),
    "newlines": ([(1, "\n\na")], [WIDE]),
    "two": ([(2, WORDS)], [WIDE, TALL]),
    "none": ([(0, WORDS)], []),
    "turns": (
        [(1, "one"), (0, "a cat"), (0, "two"), (0, "a dog"), (1, WORDS)],
        [TALL, WIDE],
    ),
}


def exchanges(turns: Turns) -> list[Exchange]:
    """A conversation as the runtime takes it."""
    answers = [said for _, said in turns[1::2]]
    asked = [Exchange(said, n) for n, said in turns[::2]]
    return [
        Exchange(e.question, e.n_pictures, a) for e, a in zip(asked, [*answers, None], strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, case: str) -> None:
    turns, pictures = CASES[case]
    request = prepare(vlm.engines, exchanges(turns), pictures, Sampling(max_tokens=16))
    inputs = original.inputs(turns, pictures)
    assert sequence(request, original.token) == inputs["input_ids"][0].tolist()
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert theirs.std() > 3 and np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("case", ["two", "none", "turns"])
def test_a_system_message_stands_where_the_chat_template_writes_it(
    vlm: VLM, original: Original, case: str
) -> None:
    turns, pictures = CASES[case]
    words = "You are terse. {prompt} 你好"
    request = prepare(vlm.engines, exchanges(turns), pictures, Sampling(), words)
    ids = original.inputs(turns, pictures, words)["input_ids"][0].tolist()
    assert sequence(request, original.token) == ids


@pytest.mark.parametrize("case", ["wide", "small", "large"])
def test_pixels_are_the_originals(vlm: VLM, original: Original, case: str) -> None:
    from edgevlm.export.parity.references.qwen2_vl import pixels
    from edgevlm.image import cut

    (picture,) = CASES[case][1]
    inputs = original.inputs(CASES[case][0], [picture])
    theirs = pixels(inputs, original.model.config.vision_config)
    np.testing.assert_array_equal(cut(picture, vlm.manifest.image), theirs)


def test_smaller_it_answers_like_the_original(
    checkpoint: Path, bundle: Path, original: Original
) -> None:
    smaller = Original.__new__(Original)
    smaller.__dict__.update(original.__dict__)
    from edgevlm.export.parity.references.qwen2_vl import processor

    smaller.processor = processor(checkpoint, 1500)
    smaller.processor.chat_template = CHAT_TEMPLATE
    inputs = smaller.inputs([(1, WORDS)], [LARGE])
    with edgevlm.load(bundle, max_pixels=1500) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [LARGE], Sampling(max_tokens=4))
        assert 8 < request.n_image <= 1500 // 64
        assert sequence(request, original.token) == inputs["input_ids"][0].tolist()
        ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3


def test_a_conversation_answers_as_if_it_were_read_anew(vlm: VLM) -> None:
    """The second question goes on from the first answer, the third brings another picture."""
    said: list[Any] = []
    vlm.forget()
    kept, asked = [], (("one", WIDE), ("two", None), ("three", TALL), ("four", None))
    for words, picture in asked:
        content: list[Any] = [{"type": "text", "text": words}]
        if picture is not None:
            content.insert(0, {"type": "image", "image": picture})
        said.append({"role": "user", "content": content})
        reply = vlm.ask(said, max_tokens=6, logprobs=1)
        kept.append(reply.tokens.kept)
        vlm.forget()
        fresh = vlm.ask(said, max_tokens=6, logprobs=1)
        assert fresh.tokens.kept == 0 and fresh.token_ids == reply.token_ids
        for a, b in zip(fresh.logprobs, reply.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        # What was drawn anew is what the next question goes on from.
        said.append({"role": "assistant", "content": reply})
    assert kept[0] == 0 and all(n > 100 for n in kept[1:])


def test_pictures_go_as_a_whole(
    bundle: Path, original: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of several batches, of which only the first was read."""
    asked, inputs = [Exchange(WORDS, 1)], original.inputs([(1, WORDS)], [WIDE])
    with edgevlm.load(bundle) as vlm:
        decoder = vlm.engines.decoder
        assert isinstance(decoder, LlamaDecoder)
        decoder.adjust(1, 1, 24, "off")
        decode_rows, read = Context._decode_rows, list[int]()

        def cancelled(context: Context, rows: Float, positions: Int32, first: int) -> None:
            if len(read) == 3:
                raise Cancelled
            read.append(len(rows))
            decode_rows(context, rows, positions, first)

        monkeypatch.setattr(Context, "_decode_rows", cancelled)
        assert vlm.ask(WORDS, TALL, max_tokens=1).finish_reason == "cancelled"
        assert len(read) == 3 and read[-1] == 24
        monkeypatch.undo()
        request = prepare(vlm.engines, asked, [WIDE], Sampling(max_tokens=6))
        n_before = sequence(request, -1).index(-1)
        ours, tokens = greedy(vlm, request, 6)
        assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3
        with pytest.raises(EngineError, match="cannot go back"):
            decoder.rollback(n_before + 5)
        decoder.rollback(n_before + request.n_image)
        decoder.rollback(n_before)


def test_continuations_are_scored_one_by_one(vlm: VLM) -> None:
    scores = vlm.score("x", ["a", "b b", "a"], WIDE)
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)


def test_a_second_decoder_goes_on_from_the_first(bundle: Path, vlm: VLM) -> None:
    expected = vlm.ask("x", WIDE, max_tokens=6).token_ids
    with edgevlm.load(bundle, repack="decode") as paired:
        assert paired.ask("x", WIDE, max_tokens=6).token_ids == expected


def test_where_a_picture_is_too_long(vlm: VLM) -> None:
    assert vlm.ask("x", np.zeros((3, 600, 3), np.uint8), max_tokens=1).tokens.image
    with pytest.raises(ImageError, match="too long and narrow .* 200 times the other"):
        vlm.ask("x", np.zeros((3, 601, 3), np.uint8))


@pytest.mark.parametrize("new", [False, True])
def test_in_4_bits_it_stays_within_its_bounds(new: bool, tmp_path: Path) -> None:
    source = write_qwen2_vl(tmp_path / "source", new=new)
    made = export_bundle(source, tmp_path / "out", quant="q8_0", vision_precision="int4")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


@pytest.mark.parametrize("vision", ["int8", "qdq8", "fp16"])
def test_quantized_it_stays_within_its_bounds(
    checkpoint: Path, vision: str, tmp_path: Path
) -> None:
    quant = "q4_k_m" if vision == "int8" else "q8_0"
    made = export_bundle(checkpoint, tmp_path / "out", quant=quant, vision_precision=vision)
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


@pytest.mark.parametrize("new", [False, True])
def test_norms_add_their_epsilon(new: bool, tmp_path: Path) -> None:
    """llama.cpp's graph of it forgets to; with one as small as published ones little shows."""
    stated = {"text_config" if new else "config": {"rms_norm_eps": 0.02}}
    source = write_qwen2_vl(tmp_path / "source", new=new, nested=new, **stated)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    worst = {stage.stage: stage.worst for stage in bundle.manifest.parity}
    assert worst["prefill"] < 1e-3 and worst["greedy"] == 0


def test_layouts_say_the_same(tmp_path: Path) -> None:
    sources = [
        inspect_source(write_qwen2_vl(tmp_path / name, **options))
        for name, options in (
            ("published", {"new": True}),
            ("saved", {"new": True, "nested": True, "mrope": "default"}),
            ("5", {"new": True, "nested": True, "mrope": "5"}),
            (
                "size",
                {
                    "new": True,
                    "processor": {
                        "min_pixels": None,
                        "max_pixels": None,
                        "size": {"shortest_edge": 256, "longest_edge": 6400},
                    },
                },
            ),
        )
    ]
    first = sources[0]
    for other in sources[1:]:
        assert (other.image, other.prompt, other.decoder) == (
            first.image,
            first.prompt,
            first.decoder,
        )


def test_a_large_bound_is_lowered_with_a_note(tmp_path: Path) -> None:
    source = write_qwen2_vl(tmp_path / "source", max_pixels=16384 * 64)
    # Pictures to calibrate another precision on would be as large as the bound allows.
    how: dict[str, Any] = {"quant": "f16", "vision_precision": "fp32", "verify": False}
    made = export_bundle(source, tmp_path / "out", **how)
    native = made.manifest.image.native
    assert native and (native.max_pixels, native.most) == (1280 * 64, 16384 * 64)
    assert any("max_pixels" in note for note in made.manifest.notes)
    picture = np.zeros((296, 296, 3), np.uint8)
    with edgevlm.load(made.folder) as vlm:
        assert vlm.image_embeddings(picture).shape[0] == 35 * 35
    with edgevlm.load(made.folder, max_pixels=10**9) as vlm:
        assert vlm.image_embeddings(picture).shape[0] == 37 * 37


def test_too_large_a_picture_says_what_to_do(tmp_path: Path) -> None:
    source = write_qwen2_vl(tmp_path / "source", text_config={"max_position_embeddings": 90})
    made = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    with edgevlm.load(made.folder) as vlm, pytest.raises(ContextOverflow, match="max_pixels"):
        vlm.ask("x", LARGE)
    with edgevlm.load(made.folder, max_pixels=2000) as vlm:
        assert vlm.ask("x", LARGE, max_tokens=1).tokens.image == 24


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": {"rope_scaling": {"type": "mrope"}}}, "mrope_section is"),
        (
            {"text_config": {"rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}},
            "add up to half of a head's width, 32",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "yarn", "mrope_section": [8, 12, 12]}}},
            "'yarn'",
        ),
        ({"config": {"image_token_id": 3}}, "image_token_id is 3"),
        ({"config": {"vision_start_token_id": 3}}, "vision_start_token_id is 3"),
        ({"vision_config": {"hidden_size": 128}}, "rows of 128, the decoder's are 256"),
        ({"vision_config": {"num_heads": 5}}, "num_heads is 5"),
        ({"vision_config": {"mlp_ratio": "x"}}, "mlp_ratio is 'x'"),
        ({"vision_config": {"in_channels": 4}}, "in_channels is 4"),
        ({"new": True, "window": 4}, "window_size is 4"),
        ({"processor": {"patch_size": 14}}, "patch_size is 14; the vision tower's is 4"),
        ({"processor": {"merge_size": 1}}, "merge_size is 1; the vision tower's is 2"),
        ({"processor": {"min_pixels": 0}}, "min_pixels is 0"),
        ({"processor": {"min_pixels": 7000}}, "min_pixels is 7000"),
        ({"processor": {"size": {"height": 28, "width": 28}}}, "only shortest_edge and longest"),
        (
            {"processor": {"size": {"shortest_edge": 1, "longest_edge": 6400}}},
            "min_pixels is 256; size says 1",
        ),
        ({"chat": "{{ bos_token }}"}, "chat_template.json: its chat_template lacks"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_qwen2_vl(tmp_path / "source", **changes))


def test_without_its_processor_it_is_refused(tmp_path: Path) -> None:
    source = write_qwen2_vl(tmp_path / "source")
    with pytest.raises(SourceError, match="one prompt template"):
        inspect_source(source, ReadOptions(template="chatml"))
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="preprocessor_config.json: is not there"):
        inspect_source(source)
