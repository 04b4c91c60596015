"""InternVL in transformers' layout, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.errors import ContextOverflow, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.export.parity.quiet import quiet
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.checkpoints.internvl import SYSTEM_TEMPLATE, write_internvl

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
SMALL = RNG.integers(0, 256, (7, 9, 3), np.uint8)
# With decomposed accents, which the tokenizer composes.
WORDS = "what is in 2024's cafe\u0301? опиши и\u0306 图片"
VARIANTS: dict[str, dict[str, Any]] = {
    "hf": {},
    "old": {"layout": "hf-old", "dtype": "bfloat16", "shards": 2, "chat": None},
    "tied": {"tied": True, "bias": False, "heads": 8, "kv_heads": 8, "files": "pair"},
    "system": {"chat": SYSTEM_TEMPLATE, "factor": 4},
    "llama": {"internlm2": True, "dtype": "bfloat16"},
}
Picture = NDArray[np.uint8]


class Original:
    """The checkpoint in transformers' own classes."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references.internvl import load, processor
        from tests.checkpoints.internvl import CHAT_TEMPLATE

        self.model = load(folder)
        self.processor = processor(folder)
        self.processor.chat_template = self.processor.chat_template or CHAT_TEMPLATE
        self.token: int = self.model.config.image_token_id

    def inputs(
        self,
        turns: Sequence[tuple[int, str]],
        pictures: Sequence[Picture],
        system: str | None = None,
    ) -> Any:
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
        given = {k: v for k, v in inputs.items() if k.startswith("pixel")}
        with torch.inference_mode():
            out = self.model(input_ids=ids, **given, logits_to_keep=len(tokens) + 1)
        rows: NDArray[np.float32] = out.logits[0].numpy()
        return rows


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl") / request.param
    return write_internvl(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "internvl" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


CASES: dict[str, tuple[list[tuple[int, str]], list[Picture]]] = {
    "wide": ([(1, WORDS)], [WIDE]),
    "tall": ([(1, WORDS)], [TALL]),
    "small": ([(1, WORDS)], [SMALL]),
    "newlines": ([(1, "\n\na")], [WIDE]),
    "two": ([(2, WORDS)], [WIDE, TALL]),
    "none": ([(0, WORDS)], []),
    "turns": (
        [(1, "one"), (0, "a cat"), (0, "two"), (0, "a dog"), (1, WORDS)],
        [TALL, WIDE],
    ),
}


def exchanges(turns: Sequence[tuple[int, str]]) -> list[Exchange]:
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


@pytest.mark.parametrize("most", [1, 4])
def test_with_fewer_tiles_it_answers_like_the_original(
    bundle: Path, original: Original, most: int
) -> None:
    original.processor.image_processor.max_patches = max(most - 1, 1)
    inputs = original.inputs([(1, WORDS)], [WIDE])
    original.processor.image_processor.max_patches = 12
    with edgevlm.load(bundle, max_tiles=most) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling(max_tokens=4))
        assert request.n_tiles <= most
        assert sequence(request, original.token) == inputs["input_ids"][0].tolist()
        ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3


def test_words_are_tokenized_in_one_form(vlm: VLM) -> None:
    composed = prepare(vlm.engines, [Exchange("caf\u00e9", 1)], [SMALL], Sampling())
    apart = prepare(vlm.engines, [Exchange("cafe\u0301", 1)], [SMALL], Sampling())
    if not vlm.manifest.prompt.normalize:  # LLaMA's tokenizer takes texts as they are
        assert composed.segments != apart.segments
        return
    assert composed.segments == apart.segments
    scores = vlm.score("x", ["caf\u00e9", "cafe\u0301"], SMALL)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(checkpoint, tmp_path / "out", quant="q4_k_m", vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


def test_what_transformers_5_saves_is_the_same_model(tmp_path: Path) -> None:
    old = write_internvl(tmp_path / "old")
    new = write_internvl(tmp_path / "new")
    config = json.loads((new / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    del text["rope_parameters"]["type"]
    text["layer_types"] = ["full_attention"] * 2
    (new / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = json.loads((new / "processor_config.json").read_text(encoding="utf-8"))
    pictures = json.loads((new / "preprocessor_config.json").read_text(encoding="utf-8"))
    (new / "preprocessor_config.json").unlink()
    pictures |= {"image_processor_type": "GotOcr2ImageProcessorPil"}
    (new / "processor_config.json").write_text(
        json.dumps(sizes | {"image_processor": pictures}), encoding="utf-8"
    )
    a, b = (inspect_source(folder) for folder in (old, new))
    assert (a.image, a.prompt, a.decoder) == (b.image, b.prompt, b.decoder)


def test_one_table_is_for_both_where_5_says_so(tmp_path: Path) -> None:
    apart = {"text_config": {"tie_word_embeddings": False}, "tied": True}
    with pytest.raises(SourceError, match="lacks the tensor for decoder.lm_head"):
        inspect_source(write_internvl(tmp_path / "4", **apart))
    inspect_source(write_internvl(tmp_path / "5", **apart, config={"tie_word_embeddings": True}))


def test_too_many_tiles_say_how_to_have_fewer(tmp_path: Path) -> None:
    source = write_internvl(tmp_path / "source", text_config={"max_position_embeddings": 90})
    made = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    with edgevlm.load(made.folder) as vlm:
        with pytest.raises(ContextOverflow, match="max_tiles"):
            vlm.ask("x", WIDE)
    with edgevlm.load(made.folder, max_tiles=4) as vlm:
        assert vlm.ask("x", WIDE, max_tokens=1).tokens.tiles == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"vision_feature_layer": -2}}, "vision_feature_layer is -2"),
        ({"config": {"vision_feature_select_strategy": "full"}}, "strategy is 'full'"),
        ({"config": {"projector_hidden_act": "relu"}}, "projector_hidden_act is 'relu'"),
        ({"config": {"downsample_ratio": 0.3}}, "downsample_ratio is 0.3"),
        ({"config": {"image_seq_length": 256}}, "image_seq_length is 256"),
        ({"config": {"image_token_id": 3}}, "image_token_id is 3"),
        ({"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm is True"),
        ({"vision_config": {"norm_type": "rms_norm"}}, "norm_type is 'rms_norm'"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling is False"),
        ({"vision_config": {"num_attention_heads": 7}}, "num_attention_heads is 7"),
        ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 4.0}}}, "'yarn'"),
        ({"text_config": {"model_type": "qwen3"}}, "'qwen3' is not one of"),
        ({"processor": {"size": {"height": 28, "width": 28}}}, "the vision tower takes 32"),
        ({"processor": {"resample": 2}}, "always cut with 3"),
        ({"processor": {"max_patches": 0}}, "max_patches is 0"),
        ({"processor": {"image_processor_type": "CLIPImageProcessor"}}, "only GotOcr2"),
        ({"chat": "{{ bos_token }}"}, "chat_template.jinja: its chat_template lacks"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_internvl(tmp_path / "source", **changes))


def test_without_its_processor_it_is_refused(tmp_path: Path) -> None:
    source = write_internvl(tmp_path / "source")
    with pytest.raises(SourceError, match="one prompt template"):
        inspect_source(source, ReadOptions(template="internvl2_5"))
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="preprocessor_config.json: is not there"):
        inspect_source(source)
