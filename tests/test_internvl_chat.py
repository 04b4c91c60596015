"""InternVL in its original layout, against its facts written anew and transformers' decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.export.checkpoint.source import read_checkpoint
from edgevlm.export.parity.quiet import quiet
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy, sequence
from tests.checkpoints.internvl import CONVERSATION, write_internvl
from tests.test_internvl import SMALL, TALL, WIDE, WORDS, Picture

pytestmark = pytest.mark.usefixtures("children_inside")

VARIANTS: dict[str, dict[str, Any]] = {
    "3-1b": {"files": "pair"},
    "2-1b": {
        "files": "pair",
        "config": {"template": "Hermes-2", "use_thumbnail": False, "max_dynamic_patch": 6},
        "dtype": "bfloat16",
        "shards": 2,
    },
    "tuned": {
        "tied": True,
        "bias": False,
        "config": {"min_dynamic_patch": 2, "system_message": "You look at cafe\u0301s."},
    },
    "2-2b": {"internlm2": True, "config": {"template": "internlm2-chat"}},
    "2.5-2b": {"internlm2": True, "heads": 8, "kv_heads": 8, "dtype": "bfloat16"},
}


class Original:
    """The checkpoint as its original's code runs it."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references import causal
        from edgevlm.export.parity.references.internvl_chat import ChatModel

        tensors = read_checkpoint(folder).tensors
        self.model = ChatModel(folder, tensors)
        self.state = causal.weights(tensors)
        self.decoder = self.model.decoder(self.state)

    def pixels(self, pictures: Sequence[Picture], most: int | None) -> list[Any]:
        return [self.model.pixels(picture, most) for picture in pictures]

    def logits(
        self, ids: Sequence[int], pixels: Sequence[Any], tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        with torch.inference_mode(), quiet():
            read = torch.tensor([[*ids, *tokens]])
            rows = self.decoder.get_input_embeddings()(read)
            if pixels:
                found = self.model.features(self.state, torch.cat(list(pixels)))
                made = self.model.embeddings(self.state, found).flatten(0, 1)
                # An answer may hold that token, too.
                rows[:, : len(ids)][read[:, : len(ids)] == self.model.context] = made
            out = self.decoder(inputs_embeds=rows, logits_to_keep=len(tokens) + 1)
        logits: NDArray[np.float32] = out.logits[0].numpy()
        return logits


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl_chat") / request.param
    return write_internvl(folder, layout="own", **VARIANTS[request.param])


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


# Exchanges, pictures, and the texts of the conversation as the models' cards write them.
CASES: dict[str, tuple[list[Exchange], list[Picture], list[str]]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE], [f"<image>\n{WORDS}"]),
    "small": ([Exchange(WORDS, 1)], [SMALL], [f"<image>\n{WORDS}"]),
    "newlines": ([Exchange("\n\na", 1)], [TALL], ["<image>\n\n\na"]),
    "two": (
        [Exchange(WORDS, 2)],
        [WIDE, TALL],
        [f"Image-1: <image>\nImage-2: <image>\n{WORDS}"],
    ),
    "none": ([Exchange(WORDS)], [], [WORDS]),
    "turns": (
        [Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS)],
        [TALL],
        ["<image>\none", "a cat", "two", "a dog", WORDS],
    ),
    "later": (
        [Exchange("one", 1, "a cat"), Exchange(WORDS, 1)],
        [TALL, WIDE],
        ["Image-1: <image>\none", "a cat", f"Image-2: <image>\n{WORDS}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_system_message_is_in_place_of_the_templates(
    vlm: VLM, original: Original, case: str
) -> None:
    asked, pictures, texts = CASES[case]
    request = prepare(vlm.engines, asked, pictures, Sampling(), "You are terse. 你好")
    tiles = [len(p) for p in original.pixels(pictures, None)]
    ids = original.model.ids(texts, tiles, system="You are terse. 你好")
    assert sequence(request, original.model.context) == ids


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, case: str) -> None:
    asked, pictures, texts = CASES[case]
    request = prepare(vlm.engines, asked, pictures, Sampling(max_tokens=16))
    pixels = original.pixels(pictures, None)
    ids = original.model.ids(texts, [len(p) for p in pixels])
    assert sequence(request, original.model.context) == ids
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(ids, pixels, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert theirs.std() > 3 and np.abs(ours - theirs).max() < 5e-3


def test_a_later_turn_reads_an_answer_as_text(vlm: VLM, original: Original) -> None:
    first = vlm.ask("one", WIDE, max_tokens=4)
    request = prepare(vlm.engines, [Exchange("one", 1, first), Exchange("two")], [WIDE], Sampling())
    n = [len(p) for p in original.pixels([WIDE], None)]
    ids = original.model.ids(["<image>\none", first.text, "two"], n)
    assert sequence(request, original.model.context) == ids


@pytest.mark.parametrize("most", [1, 5])
def test_with_fewer_tiles_it_answers_like_the_original(
    bundle: Path, original: Original, most: int
) -> None:
    thumbnail = bool(original.model.config["use_thumbnail"])
    pixels = original.pixels([WIDE], most - thumbnail if most > 1 else 1)
    ids = original.model.ids([f"<image>\n{WORDS}"], [len(p) for p in pixels])
    with edgevlm.load(bundle, max_tiles=most) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling(max_tokens=4))
        assert request.n_tiles <= most
        assert sequence(request, original.model.context) == ids
        ours, tokens = greedy(vlm, request, 4)
    assert np.abs(ours - original.logits(ids, pixels, tokens)).max() < 5e-3


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(checkpoint, tmp_path / "out", quant="q4_k_m", vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


def test_internlm2s_tokens_are_its_own(tmp_path: Path) -> None:
    source = write_internvl(tmp_path / "source", layout="own", internlm2=True)
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    original = Original(source)
    with edgevlm.load(made.folder) as vlm:
        decoder, end = vlm.engines.decoder, original.model.tokenizer.convert_tokens_to_ids
        assert original.model.tokenizer.sp_model.id_to_piece(end("<|plugin|>") - 1) == "\0"
        assert vlm.manifest.answer.stop_tokens == (end("<|im_end|>"), 2)
        for text in ("[UNUSED_TOKEN_146] [UNUSED_TOKEN_141]", " a  b ", "a", "", "\u2581x"):
            assert decoder.tokenize(text) == original.model.token_ids([text])[0], text
        # The piece that is a NUL, which no text has: it is in its place and says nothing.
        nul = end("<|plugin|>") - 1
        assert decoder.piece(nul) == b"" and decoder.piece(end("<|im_start|>")) == b""


def test_uncut_pictures_are_one_tile(tmp_path: Path) -> None:
    source = write_internvl(tmp_path / "source", layout="own", config={"dynamic_image_size": False})
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    with edgevlm.load(made.folder) as vlm:
        assert vlm.ask("x", WIDE, max_tokens=1).tokens.tiles == 1


def test_the_words_of_the_system_are_the_checkpoints_own(tmp_path: Path) -> None:
    source = write_internvl(tmp_path / "source", layout="own", conversation=CONVERSATION)
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert made.manifest.prompt.template[1] == "system\nYou are a cafe\u0301 guide."
    assert "conversation.py" in [r.file for r in made.manifest.source]
    old = inspect_source(source, ReadOptions(template="Hermes-2")).prompt
    assert old.template[1].startswith("system\n你是由上海") and "\n" not in old.template[2:3]
    with pytest.raises(SourceError, match="template 'phi3-chat' is not one of Hermes-2"):
        inspect_source(source, ReadOptions(template="phi3-chat"))
    text = (source / "conversation.py").read_text(encoding="utf-8")
    for before, after, says in (
        ("<|im_end|>\\n", "</s>", "conversation.py: internvl2_5: sep is '</s>'"),
        ("SeparatorStyle.MPT", "SeparatorStyle.CHATML", "sep_style is 'CHATML'"),
        ("Conversation(", "Conversation((", "conversation.py: cannot be read as Python"),
    ):
        changed = text.replace(before, after)
        (source / "conversation.py").write_text(changed, encoding="utf-8")
        with pytest.raises(SourceError, match=says):
            inspect_source(source)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"select_layer": -4}}, "select_layer is -4"),
        ({"config": {"ps_version": "v1"}}, "ps_version is 'v1'"),
        ({"config": {"pad2square": True}}, "pad2square is True"),
        ({"config": {"use_llm_lora": 16}}, "use_llm_lora is 16"),
        ({"config": {"use_backbone_lora": 16}}, "use_backbone_lora is 16"),
        ({"config": {"template": "phi3-chat"}}, "template 'phi3-chat' is not one of"),
        ({"config": {"force_image_size": 64}}, "force_image_size is 64"),
        ({"config": {"max_dynamic_patch": 0}}, "max_dynamic_patch is 0"),
        ({"vision_config": {"qk_normalization": True}}, "qk_normalization is True"),
        ({"vision_config": {"norm_type": "rms_norm"}}, "norm_type is 'rms_norm'"),
        ({"text_config": {"architectures": ["Phi3ForCausalLM"]}}, r"\['Phi3ForCausalLM'\]; only"),
        ({"internlm2": True, "text_config": {"bias": True}}, "llm_config.bias is True"),
        ({"internlm2": True, "text_config": {"num_key_value_heads": 4}}, "has 512 rows, config"),
        ({"text_config": {"model_type": "llama"}}, "llm_config.model_type is 'llama'"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "'linear'"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_internvl(tmp_path / "source", layout="own", **changes))
