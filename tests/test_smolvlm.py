"""SmolVLM and Idefics3 in their published layout, against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.errors import ContextOverflow, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.types import Progress
from tests.answers import greedy, sequence
from tests.checkpoints.smolvlm import write_smolvlm

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
WORDS = "what is in 2024's picture? опиши 图片"
SYSTEM = "You are terse. Думай {prompt}"
VARIANTS: dict[str, dict[str, Any]] = {
    "idefics3": {},
    "smolvlm": {"model_type": "smolvlm", "shards": 2, "dtype": "bfloat16"},
    "2.2b-v1": {"places": False, "factor": 2, "vision_heads": 2},
    "8b": {
        "text_config": {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        }
    },
    "docling": {"tied": True, "heads": 8, "kv_heads": 8},
}
Picture = NDArray[np.uint8]


class Original:
    """The checkpoint in transformers' own classes, with the publishers' chat template."""

    def __init__(self, folder: Path) -> None:
        import transformers

        from edgevlm.export.parity.references import files
        from edgevlm.export.parity.references.smolvlm import load

        hf: Any = transformers
        self.model = load(folder)
        config = self.model.config
        grid = config.vision_config.image_size // config.vision_config.patch_size
        self.processor = hf.Idefics3Processor(
            files.picture_processor(folder, "Idefics3ImageProcessor"),
            files.tokenizer(folder),
            image_seq_len=(grid // config.scale_factor) ** 2,
        )

    def inputs(self, text: str, pictures: Sequence[Picture], *, split: bool = True) -> Any:
        return self.processor(
            text=text,
            images=list(pictures) or None,
            return_tensors="pt",
            images_kwargs={"do_image_splitting": split},
        )

    def logits(self, inputs: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)]).long()], 1)
        given = {k: v for k, v in inputs.items() if k.startswith("pixel")}
        with torch.inference_mode():
            out = self.model(input_ids=ids, **given, logits_to_keep=len(tokens) + 1)
        rows: NDArray[np.float32] = out.logits[0].numpy()
        return rows


def chat(*turns: tuple[int, str]) -> str:
    """The prompt of a conversation as the published chat template writes it: of each question the
    number of pictures and the words, answers between them.
    """
    text = "<|im_start|>"
    for i, (n, said) in enumerate(turns):
        role = "Assistant" if i % 2 else "User"
        text += f"{role}:{'<image>' * n}{'' if n else ' '}{said}<end_of_utterance>\n"
    return text + "Assistant:"


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm") / request.param
    return write_smolvlm(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "smolvlm" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


CASES: dict[str, tuple[list[Exchange], list[Picture], str]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE], chat((1, WORDS))),
    "tall": ([Exchange(WORDS, 1)], [TALL], chat((1, WORDS))),
    "small": ([Exchange(WORDS, 1)], [SMALL], chat((1, WORDS))),
    "newlines": ([Exchange("\n\na", 1)], [WIDE], chat((1, "\n\na"))),
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL], chat((2, WORDS))),
    "none": ([Exchange(WORDS)], [], chat((0, WORDS))),
    "turns": (
        [Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS, 1)],
        [TALL, WIDE],
        chat((1, "one"), (0, "a cat"), (0, "two"), (0, "a dog"), (1, WORDS)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, case: str) -> None:
    exchanges, pictures, text = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=16))
    inputs = original.inputs(text, pictures)
    token = original.model.config.image_token_id
    assert sequence(request, token) == inputs["input_ids"][0].tolist()
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("case", ["two", "none", "turns"])
def test_a_system_message_stands_where_the_chat_template_writes_it(
    vlm: VLM, original: Original, case: str
) -> None:
    exchanges, pictures, text = CASES[case]
    text = text.replace("<|im_start|>", f"<|im_start|>System: {SYSTEM}<end_of_utterance>\n", 1)
    request = prepare(vlm.engines, exchanges, pictures, Sampling(), SYSTEM)
    inputs = original.inputs(text, pictures)
    assert (
        sequence(request, original.model.config.image_token_id) == inputs["input_ids"][0].tolist()
    )


def test_uncut_it_answers_like_the_original(bundle: Path, original: Original) -> None:
    inputs = original.inputs(chat((1, WORDS)), [WIDE], split=False)
    with edgevlm.load(bundle, max_tiles=1) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling(max_tokens=4))
        assert sequence(request, original.model.config.image_token_id) == (
            inputs["input_ids"][0].tolist()
        )
        ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3


def test_progress_counts_different_tiles(vlm: VLM) -> None:
    vlm.forget()
    seen: list[Progress] = []
    reply = vlm.ask("x", WIDE, max_tokens=1, progress=seen.append)
    assert reply.tokens.tiles == 13 and reply.tokens.image == 13 * vlm.manifest.image.tokens
    tiles = [(p.done, p.total) for p in seen if p.stage == "vision"]
    assert tiles == [(i, 13) for i in range(14)]
    rows = [(p.done, p.total) for p in seen if p.stage == "prefill"]
    assert rows[0][0] == 0 and rows[-1] == (reply.tokens.prompt,) * 2 and rows == sorted(rows)
    seen.clear()
    again = vlm.ask("y", WIDE, max_tokens=1, progress=seen.append)
    assert again.tokens.cached and {p.stage for p in seen} == {"prefill"}
    assert {p.total for p in seen} == {again.tokens.prompt - again.tokens.kept}
    seen.clear()
    blank = np.zeros((64, 128, 3), np.uint8)
    assert vlm.ask("x", blank, max_tokens=1, progress=seen.append).tokens.tiles == 9
    assert [p.total for p in seen if p.stage == "vision"] == [1, 1]  # of nine alike


def test_a_picture_in_a_later_turn(vlm: VLM) -> None:
    first = vlm.ask("one", WIDE, max_tokens=3)
    reply = vlm.ask(
        [
            {"role": "user", "content": [{"type": "image", "image": WIDE}, text("one")]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": [{"type": "image", "image": TALL}, text("two")]},
        ],
        max_tokens=2,
    )
    assert reply.tokens.tiles > first.tokens.tiles and reply.tokens.kept > first.tokens.image


def text(words: str) -> Any:
    return {"type": "text", "text": words}


def test_cancelled_between_tiles(vlm: VLM) -> None:
    vlm.forget()
    answer = vlm.stream("x", WIDE, max_tokens=4, progress=lambda _: answer.cancel())
    assert answer.finish().finish_reason == "cancelled"
    assert vlm.ask("x", WIDE, max_tokens=1).tokens.generated == 1


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(checkpoint, tmp_path / "out", quant="q4_k_m", vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


def test_too_many_tiles_say_how_to_have_fewer(tmp_path: Path) -> None:
    source = write_smolvlm(tmp_path / "source", text_config={"max_position_embeddings": 80})
    made = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    with edgevlm.load(made.folder) as vlm:
        with pytest.raises(ContextOverflow, match="max_tiles"):
            vlm.ask("x", WIDE)
    with edgevlm.load(made.folder, max_tiles=5) as vlm:
        assert vlm.ask("x", WIDE, max_tokens=1).tokens.tiles == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": {"use_resampler": True}}, "text_config.use_resampler is True"),
        ({"text_config": {"qk_layer_norms": True}}, "text_config.qk_layer_norms is True"),
        (
            {"text_config": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}},
            "LLaMA-3's needs low_freq_factor",
        ),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}}, "'yarn'"),
        ({"config": {"scale_factor": 3}}, "scale_factor 3 does not divide"),
        ({"processor": {"max_image_size": {"longest_edge": 64}}}, "max_image_size is .*takes 32"),
        ({"processor": {"size": {"height": 9, "width": 9}}}, "only longest_edge is known"),
        ({"processor": {"do_resize": False}}, "do_resize is False"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_smolvlm(tmp_path / "source", **changes))


def test_without_its_processor_it_is_refused(tmp_path: Path) -> None:
    source = write_smolvlm(tmp_path / "source")
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="preprocessor_config.json: is not there"):
        inspect_source(source)
    with pytest.raises(SourceError, match="one prompt template"):
        inspect_source(source, ReadOptions(template="hf"))
