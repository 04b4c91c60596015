"""TinyGPT-V: every stage and layout of its downloads, against its facts written anew in PyTorch."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edgevlm
from edgevlm import cli
from edgevlm.benchmarks.tinygptv_checkpoints import ORIGINALS, write_tinygptv
from edgevlm.bundle import Bundle
from edgevlm.errors import SourceError
from edgevlm.export import export_bundle, llama, pipeline
from edgevlm.export.components import Job
from edgevlm.export.corpus import corpus
from edgevlm.export.decoder import DecoderSource, write_gguf
from edgevlm.image import preprocess
from edgevlm.runtimes.request import input_rows, prefill, prepare
from edgevlm.sampling import Sampling
from tests.tinygptv_reference import Original

GPT2 = Path(__file__).parents[2] / "shared/data/tokenizers/gpt2"
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


def original(folder: Path, stage: int) -> Original:
    return Original(
        folder,
        heads=8,
        rotary=12,
        size=112 if stage == 4 else 56,
        stage=f"TinyGPT-V_for_Stage{stage}.pth",
    )


def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    phi = folder / "phi-2" if (folder / "phi-2").is_dir() else folder
    return AutoTokenizer.from_pretrained(phi, use_fast=not (phi / "vocab.json").is_file())


def greedy(vlm: edgevlm.VLM, prompt: str, n: int) -> tuple[np.ndarray, list[int], list]:
    """Logits [1 + n, n_vocab], the n likeliest tokens in turn, and the prompt's parts."""
    request = prepare(vlm.parts, prompt, [PICTURE], Sampling(max_tokens=n))
    prefill(vlm.parts, request, input_rows(vlm.parts, request), n)
    logits, tokens = [vlm.parts.decoder.logits()], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.parts.decoder.step(tokens[-1])
        logits.append(vlm.parts.decoder.logits())
    return np.stack(logits), tokens, request.parts


@pytest.fixture(scope="module", params=ORIGINALS)
def made(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, Bundle, dict[str, Any]]:
    """A checkpoint, its verified unquantized bundle, and what it was made of."""
    options = ORIGINALS[request.param]
    folder = tmp_path_factory.mktemp("tinygptv")
    source = write_tinygptv(folder / request.param, **options)
    bundle = export_bundle(source, folder / "out", quant="f32", vision_precision="fp32")
    return source, bundle, options


def test_every_stage_answers_like_the_original(made):
    source, bundle, options = made
    assert all(stage.ok for stage in bundle.manifest.parity)
    reference = original(source, options["stage"])
    pixels = reference.pixels(PICTURE)
    assert np.array_equal(preprocess(PICTURE, bundle.manifest.image), pixels[0].numpy())
    with edgevlm.load(bundle.folder) as vlm:
        features = vlm.parts.encoder.features(pixels.numpy())
        assert np.abs(features - reference.features(pixels).numpy()).max() < 1e-4
        rows = vlm.embed_image(PICTURE)
        assert np.abs(rows - reference.rows(PICTURE)[0].numpy()).max() < 1e-4
        ours, tokens, parts = greedy(vlm, PROMPT, 16)
    before, after = SIDES["demo_v2" if options["stage"] == 4 else "vicuna0"]
    ids = tokenizer(source)
    expected = ids(before)["input_ids"], ids(after.format(PROMPT))["input_ids"]
    assert parts == [expected[0], 0, expected[1]]
    theirs = reference.logits(PICTURE, expected, tokens)
    assert np.abs(ours - theirs).max() < 5e-3
    assert theirs[:-1].argmax(1).tolist() == tokens


def test_the_command_line_answers_chats_and_detects(made, tmp_path: Path, terminal):
    _, bundle, _ = made
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    about = ["-m", bundle.folder, "-i", tmp_path / "picture.png", "--max-tokens", "3"]
    asked, _ = terminal("ask", PROMPT, "--json", *about)
    reply = json.loads(asked.splitlines()[-1])
    assert len(reply["token_ids"]) == 3 and reply["tokens"]["image"] == 8
    talked, notes = terminal("chat", *about, stdin=f"{PROMPT}\nand now?\n/stats\n")
    assert talked.startswith(reply["text"])
    told = re.search(r"text (\d+), cached (\d+)", notes)
    assert int(told[1]) > reply["tokens"]["text"] + 3 and int(told[2]) > 8
    terminal("detect", "a cat", "-o", tmp_path / "boxes.png", *about)
    with Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.size == (90, 50)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
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


def test_what_came_from_where_is_recorded(made):
    source, bundle, options = made
    records = {record.piece: record for record in bundle.manifest.pieces}
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
def test_templates_are_the_originals(template: str, tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", stage=4)
    prompt = prepared(source, template=template).model.prompt
    before, after = SIDES[template]
    begin = ("{bos}",) if template == "training" else ()
    assert prompt.template == (*begin, before, "{image}", after.format("{prompt}"))
    assert prompt.text_template[-1] == (before + after.format("{prompt}")).replace(
        "<Img></Img> ", ""
    )


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs GPT-2's tokenizer in ../shared/data")
def test_token_ids_of_the_real_vocabulary(tmp_path: Path):
    source = write_tinygptv(
        tmp_path / "source", tokenizer=GPT2, n_vocab=51200, width=32, heads=1, layers=1, **SMALL
    )
    job, gguf = prepared(source), tmp_path / "decoder.gguf"
    assert (job.model.answer.stop_tokens, job.model.answer.penalized) == ((21017,), (50256,))
    write_gguf(
        DecoderSource(job.parts["decoder"], job.model.text, job.vocabulary, "x"), gguf, "F16", None
    )
    ids = llama.tokenize(gguf, corpus())
    expected = tokenizer(source)
    assert ids == [expected(text)["input_ids"] for text in corpus()]
    # Facts read in the original's own run: 31 spaces, 9 tabs, "###", how a prompt of stage 3 ends.
    facts = [" " * 31, "\t" * 9, "###", "a###Assistant: "]
    assert llama.tokenize(gguf, facts) == [
        [50257],
        [50287],
        [21017],
        [64, 21017, 48902, 25, 220],
    ]


def test_the_gguf_has_the_layout_that_the_runtime_expects(made):
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


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites what a file of torch or JSON holds; `change` edits it, or returns another."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))
        return
    saved = torch.load(path, weights_only=True)
    torch.save(change(saved) or saved, path)


def without(*words: str) -> Callable[[dict[str, Any]], Any]:
    """A change that takes all tensors away whose names have one of these words."""

    def change(saved: dict[str, Any]) -> None:
        state = saved.get("model", saved)
        for name in [n for n in state if any(word in n for word in words)]:
            del state[name]

    return change


def set_to(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update(values)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    """A change of the names of a file's tensors."""

    def change(saved: dict[str, Any]) -> None:
        state = saved.get("model", saved)
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return change


PHI, EVA, BLIP2, STAGE = (
    "phi-2/config.json",
    "eva_vit_g.pth",
    "blip2_pretrained_flant5xxl.pth",
    "TinyGPT-V_for_Stage3.pth",
)
WEIGHTS = "phi-2/pytorch_model.bin"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        # What the issues of the original are about: another Phi-2 than its names say.
        (WEIGHTS, renamed("query_key_value", "Wqkv"), ["Wqkv", "unknown"]),
        (WEIGHTS, renamed("model.layers", "transformer.h"), ["one layout", "another"]),
        (WEIGHTS, without("layers.1.self_attn.query"), ["lora_A", "no file has its matrix"]),
        (WEIGHTS, without("query_key_value.bias"), ["lacks", "layers.0.self_attn.q_proj.bias"]),
        (PHI, set_to(partial_rotary_factor=0.5), ["0.5", "--set partial_rotary_factor=0.4"]),
        (PHI, set_to(rope_scaling={"type": "linear", "factor": 2}), ["'linear'"]),
        (PHI, set_to(hidden_act="relu"), ["hidden_act", "relu"]),
        (PHI, set_to(num_attention_heads=4), ["0.4 turns 25 of 64"]),
        (PHI, set_to(num_hidden_layers=1), ["2 layers, the decoder has 1"]),
        (PHI, set_to(vocab_size=100), ["embed_tokens", "shape"]),
        (STAGE, without("q_layernorm"), ["Stage3.pth has no q_layernorm"]),
        (STAGE, without("post_layernorm"), ["Stage3.pth has no post_layernorm"]),
        (STAGE, without("layers.1.post_layernorm"), ["lacks", "layers.1.post_layernorm.weight"]),
        (STAGE, without("llama_proj2"), ["projector.maps.1"]),
        (STAGE, without("llama_proj"), ["Stage<N>.pth", "llama_proj.weight", "--part stage"]),
        (STAGE, without("self_attn.dense.lora_B"), ["without its lora_B"]),
        (STAGE, without("layers.0.self_attn.dense.lora"), ["1 layers, the decoder has 2"]),
        (STAGE, renamed("llama_proj2", "llama_proj3"), ["llama_proj3", "unknown"]),
        (STAGE, lambda s: s["config"]["model"].update(arch="minigpt_v2"), ["not stage 3"]),
        (STAGE, lambda s: s["config"]["model"].update(arch="blip2"), ["'blip2'"]),
        (BLIP2, without("ln_vision"), ["vision.post_layernorm"]),
        (BLIP2, without("layer.1.intermediate_query"), ["layer.1.intermediate_query"]),
        (BLIP2, without("query_tokens"), ["blip2_pretrained_flant5xxl.pth", "query_tokens"]),
        (EVA, without("blocks.0.attn.v_bias"), ["q_bias", "no place"]),
        (EVA, without("patch_embed"), ["eva_vit_g.pth", "--part eva"]),
        (EVA, lambda s: s.update(pos_embed=s["pos_embed"][:, :-1]), ["15 positions"]),
        ("phi-2/tokenizer_config.json", set_to(tokenizer_class="XTokenizer"), ["XTokenizer"]),
    ],
)
def test_what_would_answer_nonsense_is_refused(file: str, change, words, tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", weights="bin", **SMALL)
    edited(source / file, change)
    with pytest.raises(SourceError) as raised:
        prepared(source)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "out").exists()


SMALL = {"vision_layers": 1, "q_layers": 2, "mlp": 64, "middle": 16}


def prepared(source: Path, **options: Any) -> Job:
    return pipeline.prepare(source, pipeline.Options("f32", "fp32", False, None, **options), None)


def test_pickles_are_never_run(tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", **SMALL)
    edited(source / STAGE, lambda saved: {**saved, "config": Path("run")})
    with pytest.raises(SourceError, match=r"Stage3.pth: wants to run pathlib.*was refused"):
        prepared(source)


def test_files_are_known_by_what_they_hold(tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", **SMALL)
    (source / "pieces").mkdir()
    for old, new in ((EVA, "pieces/a.pth"), (BLIP2, "pieces/b.bin"), (STAGE, "checkpoint_49.pth")):
        (source / old).rename(source / new)
    job = prepared(source)
    assert [r.file for r in job.placed.pieces] == ["phi-2", "a.pth", "b.bin", "checkpoint_49.pth"]
    write_tinygptv(tmp_path / "other", stage=4, **SMALL)
    (tmp_path / "other/TinyGPT-V_for_Stage4.pth").rename(source / "TinyGPT-V_for_Stage4.pth")
    with pytest.raises(SourceError, match=r"Stage4.pth, checkpoint_49.pth\); .*--part stage=FILE"):
        prepared(source)
    stage4 = source / "TinyGPT-V_for_Stage4.pth"
    assert prepared(source, parts={"stage": stage4}).model.image.size == 112
    with pytest.raises(
        SourceError, match=r"a.pth: is not blip2_pretrained_flant5xxl.pth, it lacks"
    ):
        prepared(source, parts={"stage": stage4, "blip2": source / "pieces/a.pth"})
    (source / "phi-2").rename(tmp_path / "phi-2")
    with pytest.raises(SourceError, match="a part of a tinygptv, but not its main checkpoint"):
        prepared(source)
    given = {"stage": stage4, "eva": source / "pieces/a.pth", "blip2": source / "pieces/b.bin"}
    assert prepared(tmp_path / "phi-2", parts=given).model.image.size == 112
    (tmp_path / "phi-2").rename(source / "phi-2")
    with pytest.raises(SourceError, match="'tower' is no part of a tinygptv; its parts are eva"):
        prepared(source, parts={"tower": stage4})


def test_what_files_leave_open_can_be_stated(tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", said=False, name="checkpoint_4.pth", **SMALL)
    with pytest.raises(SourceError, match=r"checkpoint_4.pth does not say .*--set stage=1 to 4"):
        prepared(source)
    model = prepared(source, settings={"stage": "4"}).model
    assert model.image.size == 448 and model.prompt.template[0].startswith("<s>[INST] ")
    edited(source / PHI, set_to(partial_rotary_factor=0.5))
    stated = {"stage": "1", "partial_rotary_factor": "0.5", "lora_alpha": "8", "vision_heads": "4"}
    model = prepared(source, settings=stated).model
    assert (model.text["rotary_dim"], model.text["lora_alpha"]) == (16, 8)
    assert model.vision["num_attention_heads"] == 4
    for name, value, words in (
        ("stage", "5", "stage '5' is not one of"),
        ("partial_rotary_factor", "x", "'x' is no number"),
        ("vision_heads", "3", "--set vision_heads=N"),
        ("speed", "9", "'speed' cannot be set for a tinygptv; it knows stage, "),
    ):
        with pytest.raises(SourceError, match=re.escape(words)):
            prepared(source, settings={**stated, name: value})


def test_only_39_blocks_of_the_tower_are_run(tmp_path: Path):
    source = write_tinygptv(
        tmp_path / "source", vision_layers=39, vision_width=88, vision_mlp=16, q_layers=1
    )
    job = prepared(source)
    assert job.model.vision["num_hidden_layers"] == 39
    assert any("39 of 40 blocks" in note for note in job.model.notes)
    (eva,) = (r for r in job.placed.pieces if r.piece == "eva")
    assert "blocks.*.mlp.fc1.weight" in eva.unused and "blocks.*.mlp.fc1.weight x39" in eva.used


def test_a_later_piece_wins(tmp_path: Path):
    """As in the original, whose load_state_dict takes every name that its model has."""
    source = write_tinygptv(tmp_path / "source", **SMALL)
    norm = {"ln_vision.weight": torch.full((176,), 3.0), "ln_vision.bias": torch.zeros(176)}
    edited(source / STAGE, lambda saved: saved["model"].update(norm))
    first = {"visual_encoder.cls_token": torch.full((1, 1, 176), 2.0)}
    edited(source / BLIP2, lambda saved: saved["model"].update(first))
    vision = prepared(source).parts["vision"]
    assert (vision["post_layernorm.weight"].float32() == 3).all()
    assert (vision["embeddings.class_embedding"].float32() == 2).all()


def test_heads_of_the_qformer_are_berts_where_its_config_is_there(tmp_path: Path):
    source = write_tinygptv(tmp_path / "source", **SMALL)
    assert prepared(source).model.projector["num_attention_heads"] == 2
    (source / "bert-base-uncased").mkdir()
    bert = {"model_type": "bert", "num_attention_heads": 4}
    (source / "bert-base-uncased/config.json").write_text(json.dumps(bert))
    assert prepared(source).model.projector["num_attention_heads"] == 4


def test_a_chat_is_read_as_one_text(tmp_path: Path):
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
    assert second.tokens.kept == len(ids[0]) + 8
    logits = original(source, 3).logits(PICTURE, (ids[0], ids[1]), list(second.token_ids))
    assert logits[:-1].argmax(1).tolist() == list(second.token_ids)
