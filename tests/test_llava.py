"""LLaVA's shape: every published layout, against the parts of transformers."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sentencepiece

import edgevlm
from edgevlm.bundle import Bundle
from edgevlm.errors import SourceError
from edgevlm.export import export_bundle, inspect_source
from edgevlm.image import RGB
from edgevlm.prompt import Exchange, Image, Tokens
from edgevlm.runtimes.engines import Float, Int32
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.sampling import Sampling
from tests import inside, published
from tests.checkpoints import byte_vocabulary
from tests.checkpoints.llava import ORIGINALS, Tiny, write_llava
from tests.checkpoints.vocabulary import llama_model, write_json
from tests.multilingual import PROMPTS

pytestmark = pytest.mark.usefixtures("children_inside")

Make = Callable[[str], tuple[Path, Bundle]]
PICTURE = np.random.default_rng(3).integers(0, 256, (50, 90, 3), np.uint8)
PROMPT = "what is in the picture? опиши 图片"
# The prompt that MobilePALO was trained with, on both sides of the picture (palo/conversation.py).
VICUNA_PIECES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ",
    "\n{} ASSISTANT:",
)


def greedy(vlm: edgevlm.VLM, picture: RGB, prompt: str, n: int) -> tuple[Float, list[int]]:
    """Logits [1 + n, n_vocab] after the prompt and after each of the n likeliest tokens."""
    request = prepare(vlm.engines, [Exchange(prompt, 1)], [picture], Sampling(max_tokens=n))
    prefill(vlm.engines, request, input_blocks(vlm.engines, request), n)
    logits, tokens = [vlm.engines.decoder.logits()], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.engines.decoder.step(tokens[-1])
        logits.append(vlm.engines.decoder.logits())
    return np.stack(logits), tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes one of ORIGINALS and its verified unquantized bundle, each once."""

    @functools.cache
    def make(name: str) -> tuple[Path, Bundle]:
        folder = tmp_path_factory.mktemp(name)
        source = write_llava(folder / name, **ORIGINALS[name])
        out = folder / "out"
        return source, export_bundle(source, out, quant="f32", vision_precision="fp32")

    return make


@pytest.mark.parametrize("name", ORIGINALS)
def test_it_answers_like_the_original(name: str, made: Make, tmp_path: Path) -> None:
    from tests.llava_reference import Original

    options, (source, bundle) = ORIGINALS[name], made(name)
    assert all(stage.ok for stage in bundle.manifest.parity)
    with edgevlm.load(bundle.folder) as vlm:
        ours, tokens = greedy(vlm, PICTURE, PROMPT, 16)
    theirs = Original(Tiny(**options), source).logits(PICTURE, PROMPT, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3
    ask_and_chat(bundle, tmp_path, program if name == "llava-1.5" else inside.edgevlm)


def program(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line as users do."""
    return subprocess.run(
        [sys.executable, "-m", "edgevlm", *(a.encode() for a in arguments)],
        input=input,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},  # as the prompt is, whatever the locale
        check=False,
    )


def ask_and_chat(
    bundle: Bundle, folder: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The command line answers about the picture, and goes on about it in a chat."""
    PIL.Image.fromarray(PICTURE).save(folder / "picture.png")
    about = ["-m", str(bundle.folder), "-i", str(folder / "picture.png"), "--max-tokens", "3"]
    asked = command("ask", PROMPT, "--json", *about)
    assert asked.returncode == 0, asked.stderr
    reply = json.loads(asked.stdout.splitlines()[-1])
    assert len(reply["token_ids"]) == 3
    talked = command("chat", *about, input=f"{PROMPT}\nand now?\n/stats\n")
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout.startswith(reply["text"])
    # The second question follows the first and its answer.
    told = re.search(r"text (\d+), cached (\d+)", talked.stderr)
    assert told and int(told[1]) > reply["tokens"]["text"] + 3
    # What comes before the question is not read again.
    assert int(told[2]) > bundle.manifest.image.tokens


@pytest.mark.parametrize(
    ("layout", "options", "text"),
    [
        ("hf", {}, "USER: {}\nwhat is it? ASSISTANT:"),
        ("hf-4.52", {}, "USER: {}\nwhat is it? ASSISTANT:"),
        ("hf", {"legacy": False}, "USER: {}\nwhat is it? ASSISTANT:"),
        ("hf", {"vocabulary": "phi3"}, "<|user|>\n{}\nwhat is it?<|end|>\n<|assistant|>\n"),
        (
            "hf-4.52",
            {"vocabulary": "llama3", "kv_heads": 2, "text_config": {"rope_theta": 5e5}},
            "<|start_header_id|>user<|end_header_id|>\n\n{}\nwhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_transformers_layout_answers_like_transformers(
    layout: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    import torch
    import transformers

    hf: Any = transformers

    source = write_llava(tmp_path / layout, layout=layout, **options)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    with edgevlm.load(bundle.folder) as vlm:
        ours, tokens = greedy(vlm, PICTURE, "what is it?", 16)
    model = hf.LlavaForConditionalGeneration.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    ).eval()
    pixels = hf.CLIPImageProcessor.from_pretrained(source)(
        PICTURE, return_tensors="pt"
    ).pixel_values
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.format("<image>" * bundle.manifest.image.tokens))["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + tokens]), pixel_values=pixels).logits
    assert np.abs(ours - logits[0, -17:].numpy()).max() < 5e-3
    ask_and_chat(bundle, tmp_path, inside.edgevlm)


AGAIN = {
    "llama": ("</s>", "USER: and its colour? ASSISTANT:"),
    "phi3": ("<|end|>", "\n<|user|>\nand its colour?<|end|>\n<|assistant|>\n"),
    "llama3": (
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nand its colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("name", ["mobilepalo", "llava-phi3", "llava-llama3"])
def test_a_chat_goes_on_as_the_original_does(name: str, made: Make) -> None:
    from tests.llava_reference import Original

    options, (source, bundle) = ORIGINALS[name], made(name)
    with edgevlm.load(bundle.folder) as vlm, vlm.chat(PICTURE) as chat:
        first = chat.ask("what is it?", max_tokens=5)
        second = chat.ask("and its colour?", max_tokens=5)
        chat.image = PICTURE[::-1]
        assert chat.ask("what is it?", max_tokens=5).tokens.text == first.tokens.text
    original = Original(Tiny(**options), source)
    before, after = original.ids("what is it?")
    tokenizer, (end, words) = original.tokenizer, AGAIN[original.tiny.vocabulary]
    ended = tokenizer.convert_tokens_to_ids(end)
    again = tokenizer(end + words).input_ids
    again = [ended, *again[again.index(ended) + 1 :]]
    assert second.tokens.text == len(before) + len(after) + 5 + len(again)
    said = [*first.token_ids, *again]
    logits = original.logits(PICTURE, "what is it?", said + list(second.token_ids))
    assert logits[len(said) : -1].argmax(1).tolist() == list(second.token_ids)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", ["llava-phi3", "llava-llama3"])
def test_token_ids_where_templates_have_tokens_of_their_own(
    name: str, add_bos: bool, tmp_path: Path
) -> None:
    """With a tokenizer that puts the begin token before a text and with one that does not."""
    from tests.llava_reference import Original

    source = write_llava(tmp_path / "source", layers=1, **ORIGINALS[name])
    if not add_bos:
        without_begin(source)
    how: dict[str, Any] = {"quant": "f16", "vision_precision": "fp32", "verify": False}
    bundle = export_bundle(source, tmp_path / "out", **how)
    original = Original(Tiny(layers=1, **ORIGINALS[name]), source)
    special = [t for t in original.tokenizer.get_vocab() if re.fullmatch(r"<\|?\w+\|?>", t)]
    with edgevlm.load(bundle.folder) as vlm:
        for question in [q for questions in PROMPTS.values() for q in questions]:
            request = prepare(vlm.engines, [Exchange(question, 1)], [PICTURE], Sampling())
            ids = [i for s in request.segments for i in (getattr(s, "ids", None) or [-200])]
            before, after = original.ids(question)
            assert ids == [*before, -200, *after]
        # What a user types is never one of them.
        typed = vlm.engines.decoder.tokenize("".join(special))
        assert not set(typed) & {*original.tokenizer.added_tokens_decoder}
        assert b"".join(map(vlm.engines.decoder.piece, typed)).decode() == "".join(special)
        assert set(vlm.manifest.answer.stop_tokens) >= {
            original.tokenizer.convert_tokens_to_ids(AGAIN[original.tiny.vocabulary][0]),
            original.tokenizer.eos_token_id,
        }


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_system_message_is_in_place_of_the_templates(name: str, made: Make) -> None:
    from tests.llava_reference import Original

    source, bundle = made(name)
    original = Original(Tiny(**ORIGINALS[name]), source)
    with edgevlm.load(bundle.folder) as vlm:
        asked = [Exchange(PROMPT, 1)]
        request = prepare(vlm.engines, asked, [PICTURE], Sampling(), "You are terse. 你好")
        ids = [i for s in request.segments for i in (getattr(s, "ids", None) or [-200])]
        before, after = original.ids(PROMPT, "You are terse. 你好")
        assert ids == [*before, -200, *after]
        words = prepare(vlm.engines, [Exchange(PROMPT)], [], Sampling(), "You are terse. 你好")
        assert words.segments[0] == request.segments[0] and words.n_image == 0


def without_begin(source: Path) -> None:
    if (source / "tokenizer.json").exists():
        byte_vocabulary.write_llama3(source, added=("<pad>",), add_bos=False)
    else:
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        write_json(source / "tokenizer_config.json", config | {"add_bos_token": False})


@pytest.mark.parametrize("vocabulary", ["small", pytest.param("LLaMA", marks=published.needed)])
def test_token_ids_in_ten_languages(vocabulary: str, tmp_path: Path) -> None:
    questions = [question for questions in PROMPTS.values() for question in questions]
    tokenizer = published.LLAMA
    if vocabulary == "small":
        # Some of the questions are whole pieces to it, others letters, others bytes.
        tokenizer = tmp_path / "tokenizer.model"
        tokenizer.write_bytes(llama_model((*questions[::2], *VICUNA_PIECES), 2500))
    source = write_llava(tmp_path / "source", tokenizer=tokenizer, layers=1)
    how: dict[str, Any] = {"quant": "f16", "vision_precision": "fp32", "verify": False}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    before, after = VICUNA_PIECES
    with edgevlm.load(export_bundle(source, tmp_path / "out", **how).folder) as vlm:
        for question in questions:
            request = prepare(vlm.engines, [Exchange(question, 1)], [PICTURE], Sampling())
            ids = [processor.encode(text) for text in (before, after.format(question))]
            first, last = (Tokens(tuple(i)) for i in ids)
            assert request.segments == [Tokens((1,)), first, Image(0), last], question


def test_what_questions_share_is_read_once(tmp_path: Path) -> None:
    """A second question reads only its own words, one about another picture not the words before
    it; the logits are the same to the last bit.
    """
    source = write_llava(tmp_path / "source")
    bundle = export_bundle(source, tmp_path / "out", quant="q8_0", verify=False)
    mirrored = PICTURE[:, ::-1]
    with edgevlm.load(bundle.folder) as vlm:
        vlm.ask("what colour is it?", PICTURE, max_tokens=4)
        again, _ = greedy(vlm, PICTURE, PROMPT, 4)
        reply = vlm.ask(PROMPT, PICTURE, max_tokens=4)
        assert reply.tokens.cached == reply.tokens.kept > bundle.manifest.image.tokens
        read = reply.tokens.prompt - reply.tokens.kept
        assert reply.prefill_tokens_per_s == pytest.approx(read * 1e3 / reply.timings.prefill_ms)
        vlm.forget()
        forgot = vlm.ask(PROMPT, PICTURE, max_tokens=4)
        assert (forgot.tokens.cached, forgot.tokens.kept) == (0, 0)
        assert forgot.timings.vision_ms > 0 and forgot.token_ids == reply.token_ids
        other = vlm.ask(PROMPT, mirrored, max_tokens=4)
        words = reply.tokens.kept - bundle.manifest.image.tokens
        assert other.tokens.cached == other.tokens.kept == words > 0
        vlm.ask(PROMPT, PICTURE, max_tokens=1)
        after_another, _ = greedy(vlm, mirrored, PROMPT, 4)
    for picture, kept in ((PICTURE, again), (mirrored, after_another)):
        with edgevlm.load(bundle.folder) as vlm:
            fresh, _ = greedy(vlm, picture, PROMPT, 4)
        assert np.array_equal(kept, fresh)


def test_state_of_a_cancelled_prefill_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.runtimes.engines import Cancelled
    from edgevlm.runtimes.llama.context import Context

    source = write_llava(tmp_path / "source")
    bundle = export_bundle(source, tmp_path / "out", quant="q8_0", verify=False)
    decode_rows = Context._decode_rows
    with edgevlm.load(bundle.folder) as vlm:
        fresh, _ = greedy(vlm, PICTURE, PROMPT, 4)
        read: list[int] = []

        def cancelled(context: Context, rows: Float, positions: Int32, first_logits: int) -> None:
            if read:
                raise Cancelled
            read.append(len(rows))
            decode_rows(context, rows, positions, first_logits)

        monkeypatch.setattr(Context, "_decode_rows", cancelled)
        vlm.ask(PROMPT, PICTURE[:, ::-1], max_tokens=1)
        assert read == [bundle.manifest.image.tokens]
        monkeypatch.undo()
        again, _ = greedy(vlm, PICTURE, PROMPT, 4)
    assert np.array_equal(again, fresh)


def test_the_named_tower_wins_over_the_copy_inside(tmp_path: Path) -> None:
    inside = write_llava(tmp_path / "inside", seed=1)
    write_llava(tmp_path / "apart", seed=2, tower="folder")
    tower = tmp_path / "apart-tower"
    own = export_bundle(inside, tmp_path / "own", quant="f32", verify=False)
    named = export_bundle(inside, tmp_path / "named", quant="f32", verify=False, vision_tower=tower)
    assert any(r.file.startswith("tower/") for r in named.manifest.source)
    with edgevlm.load(own.folder) as a, edgevlm.load(named.folder) as b:
        assert not np.allclose(a.image_embeddings(PICTURE), b.image_embeddings(PICTURE), atol=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projector": "resampler"}, ["mm_projector_type 'resampler'", "ldpnet", "mlp<N>x_gelu"]),
        ({"config": {"mm_projector_type": "mlp0x_gelu"}}, ["the connector has 0 linear maps"]),
        (
            {"config": {"mm_projector_type": "mlp100000000000x_gelu"}},
            ["the connector has 100000000000 linear maps; 1 to 64 are known"],
        ),
        ({"config": {"image_aspect_ratio": "anyres"}}, ["image_aspect_ratio 'anyres'"]),
        ({"config": {"mm_use_im_start_end": True}}, ["mm_use_im_start_end", "lacks <im_start>"]),
        ({"config": {"mm_vision_select_layer": -9}}, ["vision layer -9"]),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, ["'linear'"]),
        (
            {"text_config": {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}},
            ["the decoder scales its positions ('longrope'); only default, dynamic, llama3"],
        ),
        (ORIGINALS["llava-phi3"] | {"text_config": {"head_dim": 32}}, ["head_dim is 32"]),
        ({"config": {"s2": True}}, ["s2 is True"]),
        (
            {"config": {"mm_resampler_type": "spatial_pool"}},
            ["mm_resampler_type is 'spatial_pool'"],
        ),
        ({"tower_config": {"model_type": "siglip_vision_model"}, "tower": "folder"}, ["siglip"]),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(
    options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    source = write_llava(tmp_path / "source", **options)
    with pytest.raises(SourceError) as raised:
        export_bundle(source, tmp_path / "out")
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_a_template_needs_its_tokens(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source")
    with pytest.raises(SourceError, match=r"needs <\|end\|>, which the tokenizer lacks"):
        export_bundle(source, tmp_path / "out", template="phi3_instruct")


def test_a_missing_tower_says_how_to_name_one(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", tower="folder", config={"mm_vision_tower": "./none"})
    with pytest.raises(SourceError, match="--vision-tower"):
        export_bundle(source, tmp_path / "out")


def test_pictures_are_padded_unless_they_are_to_be_cropped(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source")
    for fit in (None, "crop"):
        out = tmp_path / str(fit)
        bundle = export_bundle(source, out, quant="f32", vision_precision="fp32", image_fit=fit)
        assert bundle.manifest.image.fit == (fit or "pad")
        assert all(stage.ok for stage in bundle.manifest.parity)


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_decoders_of_other_families_are_refused(kind: str, tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", layout="hf", text_config={"model_type": kind})
    with pytest.raises(SourceError, match=f"text_config.model_type '{kind}' is not known"):
        inspect_source(source)


def test_positions_scaled_as_llama_3_1s(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    options = ORIGINALS["llava-llama3"] | {"text_config": {"rope_scaling": scaling}}
    source = write_llava(tmp_path / "source", **options)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert {s.stage: s for s in bundle.manifest.parity}["answer"].worst < 1e-3
