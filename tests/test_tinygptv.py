"""TinyGPT-V: every stage and layout of its downloads, against its facts written anew in PyTorch."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import edgevlm
from edgevlm import cli
from edgevlm.bundle import Bundle
from edgevlm.export import export_bundle
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.decoder import DecoderSource, write_gguf
from edgevlm.export.parity.corpus import corpus
from edgevlm.image import preprocess
from edgevlm.prompt import Exchange, Image, Segment, Tokens
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.sampling import Sampling
from tests import published
from tests.checkpoints.tinygptv import ORIGINALS, write_tinygptv
from tests.multilingual import PROMPTS
from tests.tinygptv_reference import Original
from tests.tinygptv_sources import SMALL, prepared

pytestmark = pytest.mark.usefixtures("children_inside")

PICTURE = np.random.default_rng(3).integers(0, 256, (50, 90, 3), np.uint8)
PROMPT = "what is in the picture? опиши  图片"
# What stands on both sides of the picture, from demo.py and demo_v2.py.
SIDES = {
    "vicuna0": (
        "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once "
        "I provide it to you. Please answer my questions.###Human: <Img>",
        "</Img> {}###Assistant: ",
    ),
    "demo_v2": ("<s>[INST] <Img>", "</Img> {} [/INST]"),
    "minigptv2": ("###Human: <Img>", "</Img> {}###Assistant: "),
    "training": ("[INST] <Img>", "</Img> {}  [/INST]"),
}
Terminal = Callable[..., tuple[str, str]]


def original(folder: Path, stage: int) -> Original:
    return Original(
        folder,
        heads=8,
        rotary=12,
        size=112 if stage == 4 else 56,
        stage=f"TinyGPT-V_for_Stage{stage}.pth",
    )


def tokenizer(folder: Path) -> Any:
    import transformers

    hf: Any = transformers
    phi = folder / "phi-2" if (folder / "phi-2").is_dir() else folder
    return hf.AutoTokenizer.from_pretrained(phi, use_fast=not (phi / "vocab.json").is_file())


def greedy(vlm: edgevlm.VLM, prompt: str, n: int) -> tuple[Float, list[int], Sequence[Segment]]:
    """Logits [1 + n, n_vocab], the n likeliest tokens in turn, and the prompt's segments."""
    request = prepare(vlm.engines, [Exchange(prompt, 1)], [PICTURE], Sampling(max_tokens=n))
    prefill(vlm.engines, request, input_blocks(vlm.engines, request), n)
    logits, tokens = [vlm.engines.decoder.logits()], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.engines.decoder.step(tokens[-1])
        logits.append(vlm.engines.decoder.logits())
    return np.stack(logits), tokens, request.segments


@pytest.fixture(scope="module", params=ORIGINALS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bundle, dict[str, Any]]:
    """A checkpoint, its verified unquantized bundle, and what it was made of."""
    options = ORIGINALS[request.param]
    folder = tmp_path_factory.mktemp("tinygptv")
    source = write_tinygptv(folder / request.param, **options)
    bundle = export_bundle(source, folder / "out", quant="f32", vision_precision="fp32")
    return source, bundle, options


def test_every_stage_answers_like_the_original(made: tuple[Path, Bundle, dict[str, Any]]) -> None:
    source, bundle, options = made
    assert all(stage.ok for stage in bundle.manifest.parity)
    reference = original(source, options["stage"])
    pixels = reference.pixels(PICTURE)
    assert np.array_equal(preprocess(PICTURE, bundle.manifest.image), pixels[0].numpy())
    with edgevlm.load(bundle.folder) as vlm:
        features = vlm.engines.encoder.features(pixels.numpy())
        assert np.abs(features - reference.features(pixels).numpy()).max() < 1e-4
        rows = vlm.image_embeddings(PICTURE)
        assert np.abs(rows - reference.rows(PICTURE)[0].numpy()).max() < 1e-4
        ours, tokens, segments = greedy(vlm, PROMPT, 16)
    before, after = SIDES["demo_v2" if options["stage"] == 4 else "vicuna0"]
    ids = tokenizer(source)
    expected = ids(before)["input_ids"], ids(after.format(PROMPT))["input_ids"]
    first, last = (Tokens(tuple(ids)) for ids in expected)
    assert segments == [first, Image(0), last]
    theirs = reference.logits(PICTURE, expected, tokens)
    assert np.abs(ours - theirs).max() < 5e-3
    assert theirs[:-1].argmax(1).tolist() == tokens


def test_the_command_line_answers_chats_and_detects(
    made: tuple[Path, Bundle, dict[str, Any]], tmp_path: Path, terminal: Terminal
) -> None:
    _, bundle, _ = made
    PIL.Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    about = ["-m", bundle.folder, "-i", tmp_path / "picture.png", "--max-tokens", "3"]
    asked, _ = terminal("ask", PROMPT, "--json", *about)
    reply = json.loads(asked.splitlines()[-1])
    assert len(reply["token_ids"]) == 3 and reply["tokens"]["image"] == 8
    talked, notes = terminal("chat", *about, stdin=f"{PROMPT}\nand now?\n/stats\n")
    assert talked.startswith(reply["text"])
    told = re.search(r"text (\d+), cached (\d+)", notes)
    assert told and int(told[1]) > reply["tokens"]["text"] + 3 and int(told[2]) > 8
    terminal("detect", "a cat", "-o", tmp_path / "boxes.png", *about)
    with PIL.Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.size == (90, 50)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs the command line in this process: arguments -> stdout, stderr; it must succeed."""

    def run(*arguments: object, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        monkeypatch.setattr(sys, "argv", ["edgevlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out, err

    return run


def test_what_came_from_where_is_recorded(made: tuple[Path, Bundle, dict[str, Any]]) -> None:
    source, bundle, options = made
    records = {record.name: record for record in bundle.manifest.weight_files}
    stage, adapters = records["stage"], bool(options.get("adapters", "0.2"))
    assert [*records][1:] == ["eva", "blip2", "stage"]
    assert stage.file == f"TinyGPT-V_for_Stage{options['stage']}.pth"
    assert any("query_key_value.lora_A" in name for name in stage.used) == adapters
    assert any("LoRA" in note for note in bundle.manifest.notes) == (not adapters)
    assert any("input_layernorm.weight x2" in n or ".ln.weight x2" in n
               for n in records[next(iter(records))].replaced)  # fmt: skip
    own = options.get("own_qformer", False)
    assert ("query_tokens" in records["blip2"].replaced) == own
    assert ("query_tokens" in stage.used) == own
    assert {"t5_proj.weight", "Qformer.cls.predictions.decoder.weight"} <= {
        *records["blip2"].unused
    }
    assert {"norm.weight", "head.weight"} <= {*records["eva"].unused}
    assert {f"{name}/{records[name].file}" for name in ("eva", "blip2", "stage")} <= {
        r.file for r in bundle.manifest.source
    }


@pytest.mark.parametrize("template", SIDES)
def test_templates_are_the_originals(template: str, tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", stage=4)
    prompt = prepared(source, template=template).model.prompt
    before, after = SIDES[template]
    begin = ("{bos}",) if template == "training" else ()
    system = ("{system}###Human: <Img>", "{image}", after.format("{prompt}"))
    assert prompt.system_template == (system if template == "vicuna0" else ())
    assert prompt.template == (*begin, before, "{image}", after.format("{prompt}"))
    assert prompt.text_template[-1] == (before + after.format("{prompt}")).replace(
        "<Img></Img> ", ""
    )


@pytest.mark.parametrize("vocabulary", ["small", pytest.param("GPT-2", marks=published.needed)])
def test_token_ids_are_those_of_phis_tokenizer(vocabulary: str, tmp_path: Path) -> None:
    own = {"tokenizer": published.GPT2, "n_vocab": 51200} if vocabulary == "GPT-2" else {}
    source = write_tinygptv(tmp_path / "source", **own, width=32, heads=1, layers=1, **SMALL)
    job, gguf = prepared(source), tmp_path / "decoder.gguf"
    write_gguf(
        DecoderSource(job.parts["decoder"], job.model.text, job.vocabulary, "x"), gguf, "F16", None
    )
    expected = tokenizer(source)
    # 31 spaces, 9 tabs, the separator, how a prompt of stage 3 ends.
    facts = [" " * 31, "\t" * 9, "###", "a###Assistant: "]
    texts = [*facts, *corpus(), *(q for questions in PROMPTS.values() for q in questions)]
    ids = tools.tokenize(gguf, texts)
    assert ids == [expected(text)["input_ids"] for text in texts]
    (spaces,), (tabs,), (separator,), _ = ids[:4]
    answer = job.model.answer
    assert (answer.stop_tokens, answer.penalized) == ((separator,), (spaces - 1,))
    assert tabs == spaces + 30
    if vocabulary == "GPT-2":  # read in the original's own run
        assert ids[:4] == [[50257], [50287], [21017], [64, 21017, 48902, 25, 220]]


def test_the_gguf_has_the_layout_that_the_runtime_expects(
    made: tuple[Path, Bundle, dict[str, Any]],
) -> None:
    import gguf

    source, bundle, options = made
    reader = gguf.GGUFReader(bundle.path("decoder"))
    assert reader.fields["general.architecture"].contents() == "phi2"
    assert reader.fields["phi2.rope.dimension_count"].contents() == 12
    assert reader.fields["tokenizer.ggml.pre"].contents() == "phi-2"
    w = original(source, options["stage"]).w
    names = {t.name: t.data for t in reader.tensors}
    fused = w["llama_model.model.layers.1.self_attn.query_key_value.bias"].view(8, 3, 32)
    assert np.array_equal(names["blk.1.attn_qkv.bias"], fused.transpose(0, 1).flatten().numpy())
    for name, part in (
        ("attn_q_norm", "self_attn.q_layernorm"),
        ("attn_k_norm", "self_attn.k_layernorm"),
        ("post_attention_norm", "post_layernorm"),
    ):
        stored = np.float32(reader.fields[f"tinygptv.{name}.weight"].contents())
        layers = [w[f"llama_model.model.layers.{i}.{part}.weight"].numpy() for i in range(2)]
        assert np.array_equal(stored, np.concatenate(layers))


def test_a_chat_is_read_as_one_text(tmp_path: Path) -> None:
    """The original tokenizes all that follows the picture anew with every question."""
    source = write_tinygptv(tmp_path / "source")
    bundle = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", verify=False
    )
    with edgevlm.load(bundle.folder) as vlm, vlm.chat(PICTURE) as chat:
        first = chat.ask("what is it?", max_tokens=6)
        second = chat.ask("and its colour?", max_tokens=6)
    before, after = SIDES["vicuna0"]
    text = f"{after.format('what is it?')}{first.text}###Human: and its colour?###Assistant: "
    ids = [tokenizer(source)(part)["input_ids"] for part in (before, text)]
    assert second.tokens.text == sum(map(len, ids))
    # More where the answer's tokens come out as they were drawn.
    assert second.tokens.kept >= len(ids[0]) + 8
    logits = original(source, 3).logits(PICTURE, (ids[0], ids[1]), list(second.token_ids))
    assert logits[:-1].argmax(1).tolist() == list(second.token_ids)
