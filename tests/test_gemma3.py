"""Gemma 3 in its published layouts, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.cli.models import picture_text
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.export.parity.quiet import quiet
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.checkpoints.gemma3 import CHAT_TEMPLATE, write_gemma3

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
# Pictures that pan and scan cuts into three and two.
LONG = RNG.integers(0, 256, (260, 800, 3), np.uint8)
HIGH = RNG.integers(0, 256, (520, 300, 3), np.uint8)
WORDS = "what is in 2024's picture?\n\nопиши 图片\t\tnow"
# More than the window has positions, twice.
LENGTHY = "what is there beside the red circle and the blue square? " * 4
VARIANTS: dict[str, dict[str, Any]] = {
    "old": {},
    "new": {
        "layout": "new",
        "dtype": "bfloat16",
        "shards": 2,
        "tokenizer": "json",
        "chat_file": "chat_template.jinja",
    },
    "saved-by-5": {"layout": "5", "factor": None, "tokenizer": "both"},
    # Scores scaled otherwise than by the heads' width, other layers with a window, other positions.
    "odd": {
        "query_scalar": 20,
        "heads": 8,
        "kv_heads": 8,
        "text_config": {
            "layer_types": [
                f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding") * 2
            ][:6],
            "rope_local_base_freq": 500.0,
            "rope_theta": 20000.0,
        },
    },
}
Picture = NDArray[np.uint8]
Turns = Sequence[tuple[int, str]]


class Original:
    """The checkpoint in transformers' own classes."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references.gemma3 import load, processor

        self.model = load(folder)
        self.processor = processor(folder)
        self.token: int = self.model.config.image_token_id

    def inputs(
        self, turns: Turns, pictures: Sequence[Picture], system: str | None = None, **images: Any
    ) -> Any:
        """A conversation: of each question the number of pictures and the words, answers between
        them. Without a chat template the words as they are.
        """
        text = "<start_of_image>" * turns[0][0] + turns[0][1]
        chat = self.processor.chat_template
        if chat:
            messages: list[dict[str, Any]] = [
                {
                    "role": ("user", "assistant")[i % 2],
                    "content": [{"type": "image"}] * n + [{"type": "text", "text": said}],
                }
                for i, (n, said) in enumerate(turns)
            ]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        with quiet():
            return self.processor(
                text=text,
                images=[list(pictures)] if pictures else None,
                return_tensors="pt",
                add_special_tokens=not chat,
                **images,
            )

    def logits(self, inputs: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        more = torch.tensor([list(tokens)]).long()
        ids = torch.cat([inputs["input_ids"], more], 1)
        kinds = torch.cat([inputs["token_type_ids"], torch.zeros_like(more)], 1)
        given = {k: v for k, v in inputs.items() if k == "pixel_values"}
        with torch.inference_mode():
            out = self.model(
                input_ids=ids,
                token_type_ids=kinds,
                use_cache=False,
                logits_to_keep=len(tokens) + 1,
                **given,
            )
        rows: NDArray[np.float32] = out.logits[0].numpy()
        return rows


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / request.param
    return write_gemma3(folder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


def exported(source: Path) -> Path:
    """The folder of an f32 bundle that is like its original."""
    out = source.with_name(source.name + "-out")
    made = export_bundle(source, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "gemma3" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return exported(checkpoint)


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, threads=1) as loaded:
        yield loaded


def exchanges(turns: Turns) -> list[Exchange]:
    """A conversation as the runtime takes it."""
    answers = [said for _, said in turns[1::2]]
    asked = [Exchange(said, n) for n, said in turns[::2]]
    return [
        Exchange(e.question, e.n_pictures, a) for e, a in zip(asked, [*answers, None], strict=True)
    ]


CASES: dict[str, tuple[Turns, list[Picture]]] = {
    "wide": ([(1, WORDS)], [WIDE]),
    "blanks": ([(1, " \n\na \n")], [TALL]),
    "two": ([(2, WORDS)], [WIDE, TALL]),
    "none": ([(0, LENGTHY)], []),
    "lengthy": ([(1, LENGTHY)], [WIDE]),
    "turns": (
        [(1, "one"), (0, "\n a cat \n"), (0, "two"), (0, "a dog"), (1, WORDS)],
        [TALL, WIDE],
    ),
}


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


@pytest.mark.parametrize("pictures", [[], [WIDE]])
def test_a_system_message_stands_before_the_first_words(
    vlm: VLM, original: Original, pictures: list[Picture]
) -> None:
    system = " You are\na pirate. \n"
    turns: Turns = [(len(pictures), "who?"), (0, "a cat"), (0, "why?")]
    request = prepare(vlm.engines, exchanges(turns), pictures, Sampling(max_tokens=4), system)
    inputs = original.inputs(turns, pictures, system)
    assert sequence(request, original.token) == inputs["input_ids"][0].tolist()
    ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3


@pytest.mark.parametrize("most", [5, 3, 2])
def test_cut_it_answers_like_the_original(bundle: Path, original: Original, most: int) -> None:
    turns, pictures = [(2, WORDS)], [LONG, HIGH]
    crops = {"do_pan_and_scan": most > 2, "pan_and_scan_max_num_crops": most - 1}
    inputs = original.inputs(turns, pictures, images_kwargs=crops)
    with edgevlm.load(bundle, threads=1, max_tiles=most) as vlm:
        request = prepare(vlm.engines, exchanges(turns), pictures, Sampling(max_tokens=4))
        assert request.n_tiles == {5: 7, 3: 6, 2: 2}[most]
        assert sequence(request, original.token) == inputs["input_ids"][0].tolist()
        ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(inputs, tokens)).max() < 5e-3


def test_a_photo_is_cut_where_it_is_asked_for(bundle: Path) -> None:
    shown = picture_text(open_bundle(bundle).manifest.image)
    assert shown.endswith("1 tile, 16 tokens; 3 tiles, 48 tokens with --max-tiles 5")


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(checkpoint, tmp_path / "out", quant="q4_k_m", vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a chat template, as the pretrained ones are."""
    return write_gemma3(tmp_path_factory.mktemp("plain") / "pt", chat=None)


def test_a_pretrained_one_goes_on_from_the_words(plain: Path) -> None:
    theirs = Original(plain)
    with edgevlm.load(exported(plain), threads=1) as vlm:
        assert any("no chat_template" in note for note in vlm.manifest.notes)
        request = prepare(vlm.engines, [Exchange(" a cat ", 1)], [WIDE], Sampling(max_tokens=4))
        inputs = theirs.inputs([(1, " a cat ")], [WIDE])
        assert sequence(request, theirs.token) == inputs["input_ids"][0].tolist()
        ours, tokens = greedy(vlm, request, 4)
        assert np.abs(ours - theirs.logits(inputs, tokens)).max() < 5e-3


def test_a_template_can_be_chosen(plain: Path, tmp_path: Path) -> None:
    chat = inspect_source(plain, ReadOptions(template="chat"))
    assert chat.prompt.turn and not chat.notes
    made = export_bundle(plain, tmp_path / "out", quant="f32", vision_precision="fp32",
                         template="chat")  # fmt: skip
    assert all(stage.ok for stage in made.manifest.parity) and made.manifest.prompt == chat.prompt
    with pytest.raises(SourceError, match="the template 'hf' is not one of chat, plain"):
        inspect_source(plain, ReadOptions(template="hf"))


def test_the_gguf_says_what_llama_cpps_converter_writes(tmp_path: Path) -> None:
    source = write_gemma3(tmp_path / "source")
    made = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    found = gguf.GGUFReader(made.path("decoder")).fields
    kinds = {
        "attention.head_count": "UINT32",
        "attention.key_length": "UINT32",
        "attention.layer_norm_rms_epsilon": "FLOAT32",
        "attention.sliding_window": "UINT32",
        "rope.freq_base": "FLOAT32",
        "rope.scaling.factor": "FLOAT32",
        "rope.scaling.type": "STRING",
    }
    assert {k: found[f"gemma3.{k}"].types[0].name for k in kinds} == kinds
    assert found["gemma3.rope.scaling.type"].contents() == "linear"
    assert "gemma3.rope.freq_base_swa" not in found
    assert "gemma3.attention.sliding_window_pattern" not in found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping is 50.0"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is 30.0"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text_config": {"model_type": "gemma2"}}, "only 'gemma3_text' is known"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "'yarn'; only linear"),
        ({"text_config": {"layer_types": ["full_attention"]}}, "only 6 times"),
        ({"window": 15}, "sliding_window is 15, less than the 16 image embeddings"),
        ({"config": {"vision_config": None}}, "vision_config is not there"),
        ({"config": {"mm_tokens_per_image": 9}}, "mm_tokens_per_image is 9"),
        ({"config": {"boi_token_index": 7}}, "boi_token_index is 7, but <start_of_image>"),
        ({"chat": "{{ messages }}"}, "chat_template.json: its chat_template is not Gemma's"),
        ({"processor": {"do_pan_and_scan": True}}, "do_pan_and_scan is True; .* max_tiles"),
        ({"processor": {"size": {"height": 9, "width": 9}}}, "the vision tower takes 64 pixels"),
        ({"config": {"model_type": "gemma3_text"}}, "a Gemma 3 that reads text alone"),
        ({"config": {"model_type": "gemma3n"}}, "Gemma 3n, whose vision tower"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_gemma3(tmp_path / "source", **changes))


def test_without_a_processor_it_is_the_classs_own(tmp_path: Path) -> None:
    source = write_gemma3(tmp_path / "source")
    stated = inspect_source(source)
    (source / "preprocessor_config.json").unlink()
    found = inspect_source(source)
    assert found.image == stated.image and "no preprocessor_config.json" in found.notes[0]


def test_the_chat_template_may_lie_in_the_tokenizers_config(tmp_path: Path) -> None:
    source = write_gemma3(tmp_path / "source", chat=None)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert inspect_source(source).prompt.turn
