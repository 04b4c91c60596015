"""DeepSeek-VL in both layouts, against transformers and the original's facts written anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.errors import SourceError, UnknownFamily
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.export.checkpoint.source import read_checkpoint
from edgevlm.export.parity.quiet import quiet
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.deepseek_vocabulary import END, IMAGE
from tests.checkpoints.saved_by_5 import as_saved_by_5

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(8)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
# With signs of bytes that are tokens, runs of spaces and of digits.
WORDS = "what is   in 2024's picture?  größe опиши 图片，한국 cafe\u0301"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "bf16": {"dtype": "bfloat16", "shards": 2, "head": False, "tokenizer": {"legacy": None}},
    "normalised-before": {
        "vision_config": {"pixel_mean": None, "pixel_std": None},
        "pictures": {"do_normalize": True},
        "depth": 1,
        "kv_heads": 2,
    },
    "hf": {"layout": "hf"},
    "hf-tanh": {
        "layout": "hf",
        "head": False,
        "dtype": "float16",
        "shards": 3,
        "vision_config": {"hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 4},
    },
    "hf-tied": {"layout": "hf", "tied": True, "kv_heads": 1, "tokenizer": {"pad_token": END}},
}
Picture = NDArray[np.uint8]


class Original:
    """A checkpoint as the original's code or transformers runs it."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references import causal, deepseek_vl

        self.module: Any = deepseek_vl
        self.own = (
            json.loads((folder / "config.json").read_text("utf-8"))["model_type"] != "deepseek_vl"
        )
        if self.own:
            tensors = read_checkpoint(folder).tensors
            self.model: Any = deepseek_vl.OriginalModel(folder, tensors)
            self.state = causal.weights(tensors)
            self.decoder, self.image = self.model.decoder(self.state), self.model.image
        else:
            with quiet():
                self.processor = deepseek_vl.load_processor(folder)
            self.model = deepseek_vl.load(folder)
            self.image = self.model.config.image_token_id

    def ids(self, said: Sequence[tuple[int, str]], system: str | None = None) -> list[int]:
        """Of a conversation, of each turn the number of its pictures and the words."""
        if self.own:
            ids: list[int] = self.model.ids([IMAGE * n + words for n, words in said], system)
            return ids
        turns = []
        if system is not None:
            turns.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for i, (n, words) in enumerate(said):
            content: list[dict[str, str]] = [{"type": "image"}] * n
            content = [*content, {"type": "text", "text": words}]
            turns.append({"role": ("user", "assistant")[i % 2], "content": content})
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        found: list[int] = self.processor(text=text)["input_ids"][0].tolist()
        return found

    def logits(
        self, ids: Sequence[int], pictures: Sequence[Picture], tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        read = torch.tensor([[*ids, *tokens]])
        with torch.inference_mode(), quiet():
            if self.own:
                rows = self.decoder.get_input_embeddings()(read)
                pixels = [self.model.pixels(picture) for picture in pictures]
                if pixels:
                    found = self.model.features(self.state, torch.cat(pixels))
                    made = self.model.embeddings(self.state, found).flatten(0, 1)
                    # An answer may hold that token, too.
                    rows[:, : len(ids)][read[:, : len(ids)] == self.image] = made
                out = self.decoder(inputs_embeds=rows, logits_to_keep=len(tokens) + 1)
            else:
                given = {}
                if pictures:
                    images = self.processor.image_processor(list(pictures), return_tensors="pt")
                    given = {"pixel_values": images["pixel_values"]}
                out = self.model(input_ids=read, **given, logits_to_keep=len(tokens) + 1)
        logits: NDArray[np.float32] = out.logits[0].numpy()
        return logits


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek_vl") / request.param
    return write_deepseek_vl(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "deepseek_vl" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


CASES: dict[str, tuple[list[Exchange], list[Picture], list[tuple[int, str]]]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE], [(1, WORDS)]),
    "tall": ([Exchange(WORDS, 1)], [TALL], [(1, WORDS)]),
    "small": ([Exchange(WORDS, 1)], [SMALL], [(1, WORDS)]),
    "blanks": ([Exchange("\n\n a \n", 1)], [WIDE], [(1, "\n\n a \n")]),
    "blanks alone": ([Exchange("\t a \n")], [], [(0, "\t a \n")]),
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL], [(2, WORDS)]),
    "none": ([Exchange(WORDS)], [], [(0, WORDS)]),
    "turns": (
        [Exchange("one", 1, " a cat\n"), Exchange("two ", 0, "a dog"), Exchange(WORDS, 1)],
        [TALL, WIDE],
        [(1, "one"), (0, " a cat\n"), (0, "two "), (0, "a dog"), (1, WORDS)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, case: str) -> None:
    exchanges, pictures, said = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=16))
    ids = original.ids(said)
    assert sequence(request, original.image) == ids
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(ids, pictures, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert 2 < theirs.std() < 10 and np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("case", ["two", "none", "turns"])
def test_a_system_message_stands_where_the_original_writes_it(
    vlm: VLM, original: Original, case: str
) -> None:
    exchanges, pictures, said = CASES[case]
    request = prepare(vlm.engines, exchanges, pictures, Sampling(), "You are terse. 你好")
    assert sequence(request, original.image) == original.ids(said, "You are terse. 你好")


def test_an_answer_of_its_own_is_kept_as_it_said_it(vlm: VLM) -> None:
    with vlm.chat(image=WIDE) as chat:
        first = chat.ask("one", max_tokens=3)
        second = chat.ask("two", max_tokens=2)
    assert second.tokens.kept > first.tokens.image


@pytest.mark.parametrize("layout", ["hf", "hf-5"])
def test_saved_by_transformers_5(layout: str, tmp_path: Path) -> None:
    source = as_saved_by_5(write_deepseek_vl(tmp_path / "source", layout=layout, dtype="bfloat16"))
    (source / "chat_template.jinja").unlink()
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in made.manifest.parity) and len(made.manifest.parity) >= 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {"gen_vision_config": {}}}, "gen_vision_config is a part of Janus"),
        ({"config": {"vision_config": {"cls": "HybridVisionTower"}}}, "cls is 'HybridVisionTower'"),
        ({"vision_config": {"model_name": "sam_b_downsample"}}, "model_name is 'sam_b_downsample'"),
        ({"vision_config": {"select_layer": -2}}, "select_layer is -2; only -1 is known"),
        ({"vision_config": {"ignore_head": False}}, "ignore_head is False"),
        ({"vision_config": {"image_size": 60}}, "60 pixels in patches of 8"),
        ({"vision_config": {"image_size": 128}}, "num_image_tokens is 64, config.json makes 256"),
        ({"pictures": {"image_size": 128}}, "image_size is 128; the vision tower takes 64"),
        ({"vision_config": {"pixel_std": [0.5, 0, 0.5]}}, "pixel_std: no channel's may be 0"),
        ({"vision_config": {"pixel_mean": [0.5]}}, "pixel_mean' must have 3 items"),
        ({"pictures": {"do_normalize": True}}, "do_normalize is True; .*pixel_mean"),
        ({"pictures": None}, "preprocessor_config.json: is not there"),
        ({"config": {"aligner_config": {"cls": "Resampler"}}}, "aligner_config.cls is 'Resampler'"),
        (
            {"config": {"aligner_config": {"cls": "MlpProjector", "params": {"depth": 2}}}},
            "aligner_config.params.projector_type is None; only 'mlp_gelu'",
        ),
        ({"text_config": {"model_type": "mistral"}}, "the decoder is a 'mistral'"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "'linear'"),
        ({"processor": {"num_image_tokens": 576}}, "num_image_tokens is 576, .* makes 64"),
        ({"processor": {"add_special_token": True}}, "add_special_token is True"),
        ({"processor": {"sft_format": "plain"}}, "sft_format is 'plain'"),
        ({"layout": "hf", "vision_config": {"model_type": "clip_vision_model"}}, "only siglip"),
        ({"layout": "hf", "vision_config": {"num_channels": 1}}, "1 channels"),
        ({"layout": "hf", "config": {"image_token_id": 7}}, "image_token_id is 7, the tokenizer's"),
        ({"layout": "hf", "pictures": {"do_pad": False}}, "do_pad is False"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_deepseek_vl(tmp_path / "source", **options))


@pytest.mark.parametrize("kind", ["deepseek_vl_hybrid", "janus"])
def test_its_kin_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = write_deepseek_vl(tmp_path / "source", layout="hf", config={"model_type": kind})
    with pytest.raises(UnknownFamily, match=f"'{kind}' is not a known model family"):
        inspect_source(source)


def test_choices_that_it_does_not_have(tmp_path: Path) -> None:
    source = write_deepseek_vl(tmp_path / "source")
    for options in (ReadOptions(template="hf"), ReadOptions(image_fit="pad")):
        with pytest.raises(SourceError, match="one prompt template and one fit"):
            inspect_source(source, options)


def test_a_tokenizer_without_its_tokens_is_refused(tmp_path: Path) -> None:
    source = write_deepseek_vl(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text("utf-8")
        (source / name).write_text(text.replace(IMAGE, "<other>"), "utf-8")
    with pytest.raises(SourceError, match=f"the tokenizer lacks {IMAGE}"):
        inspect_source(source)
