"""The real engines on tiny checkpoints: the original's logits, and what a user can do to them."""

import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import VLM
from edgevlm.bundle import Bundle
from edgevlm.errors import BundleCorrupt, ContextOverflow, EngineError, EngineMissing, PromptError
from edgevlm.export import export_bundle
from edgevlm.image import RGB, preprocess
from edgevlm.runtimes.engines import Block, BlockAttention, Float, TextDecoder, sequential
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.sampling import Sampling
from edgevlm.types import Progress, RunSettings
from tests.checkpoints.paligemma import write_paligemma
from tests.reference import Original

PICTURE = np.random.default_rng(7).integers(0, 256, (70, 110, 3), np.uint8)
OTHER = np.random.default_rng(8).integers(0, 256, (30, 20, 3), np.uint8)
# Float32 sums in another order, through three layers, on logits of standard deviation 5; the
# requirement is 5e-3.
EXACT = 5e-4


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[VLM, Original]]:
    """A loaded unquantized bundle and its original."""
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    with edgevlm.load(bundle.folder) as vlm:
        yield vlm, Original(checkpoint)


@pytest.fixture(scope="module")
def vlm(paligemma_bundle: Bundle) -> Iterator[VLM]:
    with edgevlm.load(paligemma_bundle.folder) as loaded:
        yield loaded


def pixels(vlm: VLM, *pictures: RGB) -> Float:
    spec = vlm.manifest.image
    if not pictures:
        return np.empty((0, 3, 1, 1), np.float32)
    return np.stack([preprocess(p, spec) for p in pictures])


def prompt_ids(vlm: VLM, prompt: str) -> list[int]:
    decoder = vlm.engines.decoder
    return [decoder.bos, *decoder.tokenize(prompt + "\n")]


@pytest.mark.parametrize("prompt", ["caption en", "", "detect <loc0100> a  b ; ζωή 🙂"])
def test_logits_and_greedy_tokens_equal_the_originals(
    pair: tuple[VLM, Original], prompt: str
) -> None:
    vlm, original = pair
    answer = list(vlm.ask(prompt, PICTURE, max_tokens=16).token_ids)
    ids = prompt_ids(vlm, prompt)
    expected = original.logits(pixels(vlm, PICTURE), ids, answer)
    assert 3 < expected.std() < 8
    assert answer == expected[: len(answer)].argmax(1).tolist()
    decoder = vlm.engines.decoder
    rows = np.concatenate([vlm.image_embeddings(PICTURE), decoder.embed(ids)])
    decoder.prefill([sequential(rows, "bidirectional")], room=16)
    found = [decoder.logits()]
    for token in answer:
        decoder.step(token)
        found.append(decoder.logits())
    assert np.abs(np.stack(found) - expected).max() < EXACT
    decoder.rollback(len(rows))
    assert np.abs(decoder.extend(answer) - expected[1:]).max() < EXACT


@pytest.mark.parametrize(
    "text_config",
    [
        {"query_pre_attn_scalar": 100, "attn_logit_softcapping": None},
        {"rope_theta": 500.0, "query_pre_attn_scalar": 256},
    ],
)
def test_configs_that_llama_cpp_would_compute_otherwise(
    text_config: dict[str, Any], tmp_path: Path
) -> None:
    source = write_paligemma(
        tmp_path / "source",
        version=2,
        text_config=text_config,
        vision_config={"hidden_act": "gelu"},
    )
    original = Original(source)
    bundle = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", verify=False
    )
    with edgevlm.load(bundle.folder) as vlm:
        answer = list(vlm.ask("caption en", PICTURE, max_tokens=8).token_ids)
        ids = prompt_ids(vlm, "caption en")
        expected = original.logits(pixels(vlm, PICTURE), ids, answer)
        assert answer == expected[: len(answer)].argmax(1).tolist()
        score = vlm.score("caption en", [vlm.engines.decoder.piece(answer[0]).decode()], PICTURE)
        z = expected[0].astype(np.float64)
        assert score == pytest.approx(z[answer[0]] - np.log(np.exp(z).sum()), abs=EXACT)


def test_several_pictures_and_none(pair: tuple[VLM, Original]) -> None:
    vlm, original = pair
    for pictures in ([PICTURE, OTHER], []):
        answer = list(vlm.ask("caption en", pictures, max_tokens=4).token_ids)
        ids = prompt_ids(vlm, "caption en")
        expected = original.logits(pixels(vlm, *pictures), ids, answer)
        assert answer == expected[: len(answer)].argmax(1).tolist()


def test_score_is_the_originals_log_probability(pair: tuple[VLM, Original]) -> None:
    vlm, original = pair
    texts = ["a red circle", "yes", "<loc0001> x"]
    found = vlm.score("caption en", texts, PICTURE)
    for text, score in zip(texts, found, strict=True):
        tokens = vlm.engines.decoder.tokenize(text)
        logits = original.logits(pixels(vlm, PICTURE), prompt_ids(vlm, "caption en"), tokens)
        z = logits[:-1].astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        assert score == pytest.approx(
            log_p[range(len(tokens)), tokens].sum(), abs=len(tokens) * EXACT
        )


def prefix_of(vlm: VLM, n: int) -> str:
    """A prompt whose prefix, picture included, has n positions."""
    fixed = vlm.manifest.image.tokens + len(prompt_ids(vlm, ""))
    piece = " a"
    prompt = piece * (n - fixed)
    while (short := n - vlm.manifest.image.tokens - len(prompt_ids(vlm, prompt))) != 0:
        prompt = prompt + piece * short if short > 0 else prompt[: short * len(piece)]
    return prompt


@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
def test_prefixes_around_the_limits_of_batch_and_context(
    pair: tuple[VLM, Original], n: int
) -> None:
    vlm, original = pair
    prompt = prefix_of(vlm, n)
    reply = vlm.ask(prompt, PICTURE, max_tokens=2)
    assert reply.tokens.prompt == n
    expected = original.logits(pixels(vlm, PICTURE), prompt_ids(vlm, prompt), list(reply.token_ids))
    assert np.abs(vlm.engines.decoder.logits() - expected[len(reply.token_ids) - 1]).max() < EXACT


def test_a_longer_request_after_a_shorter_one_and_back(vlm: VLM) -> None:
    short = vlm.ask("caption en", PICTURE, max_tokens=8).token_ids
    vlm.ask(prefix_of(vlm, 700), PICTURE, max_tokens=300)
    assert vlm.ask("caption en", PICTURE, max_tokens=8).token_ids == short


def test_the_largest_prompt_and_one_token_more(tmp_path: Path) -> None:
    context = 300
    source = write_paligemma(tmp_path / "source", text_config={"max_position_embeddings": context})
    bundle = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", verify=False
    )
    with edgevlm.load(bundle.folder) as vlm:
        reply = vlm.ask(prefix_of(vlm, context - 1), PICTURE, max_tokens=5)
        assert reply.tokens.prompt == context - 1
        assert reply.tokens.generated <= 1
        with pytest.raises(ContextOverflow, match=f"has {context}"):
            vlm.ask(prefix_of(vlm, context), PICTURE)


def test_a_second_question_reuses_the_pictures_rows(vlm: VLM) -> None:
    fresh = vlm.ask("ocr", OTHER, max_tokens=8)
    assert fresh.tokens.cached == 0 and fresh.timings.vision_ms > 0
    again = vlm.ask("caption en", OTHER, max_tokens=8)
    assert again.tokens.cached == again.tokens.image and again.timings.vision_ms == 0
    assert vlm.ask("ocr", OTHER, max_tokens=8).token_ids == fresh.token_ids


def test_token_ids_beyond_the_vocabulary_are_refused(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    for token in (-1, vlm.manifest.decoder.n_vocab):
        with pytest.raises(EngineError, match="outside the vocabulary"):
            decoder.embed([token])
        vlm.ask("x", max_tokens=1)
        with pytest.raises(EngineError, match="outside the vocabulary"):
            decoder.step(token)


def test_what_llama_cpp_would_abort_on_is_refused(vlm: VLM) -> None:
    decoder, width = vlm.engines.decoder, vlm.manifest.decoder.n_embd
    for rows in (np.zeros((0, width), np.float32), np.zeros((3, width - 1), np.float32)):
        with pytest.raises(EngineError, match="rows"):
            decoder.prefill([sequential(rows, "bidirectional")], room=1)
    with pytest.raises(ContextOverflow):
        decoder.prefill([sequential(np.zeros((5, width), np.float32), "bidirectional")], room=10**6)
    decoder.prefill([sequential(np.zeros((5, width), np.float32), "bidirectional")], room=1)
    for n in (0, 6, -1):
        with pytest.raises(EngineError, match="cannot go back"):
            decoder.rollback(n)


def test_causal_rows_equal_causal_tokens(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    tokens = decoder.tokenize("the quick brown fox jumps over the lazy dog " * 80)
    assert len(tokens) > 600  # more than one batch
    decoder.prefill([sequential(decoder.embed(tokens), "causal")], room=1)
    at_once = decoder.logits()
    decoder.prefill([sequential(decoder.embed(tokens[:1]), "causal")], room=len(tokens))
    assert np.abs(decoder.extend(tokens[1:])[-1] - at_once).max() < EXACT


def test_sampling_is_repeatable_by_its_seed_and_free_without(vlm: VLM) -> None:
    def drawn(**options: Any) -> tuple[int, ...]:
        return vlm.ask("caption en", PICTURE, max_tokens=12, temperature=1.5, **options).token_ids

    assert drawn(seed=1) == drawn(seed=1)
    assert len({drawn(seed=s) for s in range(4)} | {drawn(), drawn()}) > 1
    greedy = vlm.ask("caption en", PICTURE, max_tokens=12).token_ids
    assert drawn(top_k=1) == drawn(min_p=1.0) == drawn(top_p=1e-6) == greedy


def test_repetition_penalty_counts_the_answer_alone(vlm: VLM) -> None:
    sampler = Sampling(repetition_penalty=1e6)
    ids = prompt_ids(vlm, "caption en")
    rows = np.concatenate([vlm.image_embeddings(PICTURE), vlm.engines.decoder.embed(ids)])
    decoder = vlm.engines.decoder
    decoder.prefill([sequential(rows, "bidirectional")], room=20)
    drawn = []
    chain = decoder.sampler(sampler)
    for _ in range(20):
        best = int(decoder.logits().argmax())
        drawn.append(chain.sample())
        if best not in drawn[:-1]:
            assert drawn[-1] == best
        decoder.step(drawn[-1])
    chain.close()
    assert len(set(drawn)) == 20


def test_pieces_are_the_tokenizers_own_text(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    for text in ("a  b\n\tc", "<loc0012><seg003> cat ; dog", "ζωή 日本語 🙂 नमस्ते", "x" * 300):
        assert b"".join(map(decoder.piece, decoder.tokenize(text))).decode() == text
    assert decoder.piece(decoder.bos) == b""


def test_cancel_from_another_thread_ends_a_prefill(vlm: VLM) -> None:
    seen: list[Progress] = []
    answer = vlm.stream(prefix_of(vlm, 4000), PICTURE, progress=seen.append)
    threading.Timer(0.3, vlm.cancel).start()
    reply = answer.finish()
    assert (reply.text, reply.finish_reason) == ("", "cancelled")
    read = [step.done < step.total for step in seen if step.stage == "prefill"]
    assert read and all(read)
    assert vlm.ask("caption en", PICTURE, max_tokens=4).finish_reason == "length"


def test_threads_do_not_change_the_answer(paligemma_bundle: Bundle, vlm: VLM) -> None:
    with edgevlm.load(paligemma_bundle.folder, threads=1) as single:
        assert (
            single.ask("ocr", PICTURE, max_tokens=8).token_ids
            == vlm.ask("ocr", PICTURE, max_tokens=8).token_ids
        )
    with pytest.raises(PromptError, match="threads"):
        edgevlm.load(paligemma_bundle.folder, threads=0)


def test_all_decoding_runs_on_one_thread(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    decode = llama.llama_decode

    def noted(*given: Any) -> Any:
        threads.add(threading.get_ident())
        return decode(*given)

    monkeypatch.setattr(llama, "llama_decode", noted)
    vlm.ask("caption en", PICTURE, max_tokens=3)
    vlm.score("caption en", ["a cat", "a dog"], PICTURE)
    # OpenMP gives every thread a team of workers of its own; two teams slow each other down.
    assert len(threads) == 1


def test_devices_that_are_not_there_are_named(paligemma_bundle: Bundle) -> None:
    with pytest.raises(EngineMissing, match="'npu' cannot run the vision encoder.*pip install"):
        edgevlm.load(paligemma_bundle.folder, device="npu")
    with pytest.raises(
        EngineMissing, match="unknown device 'tpu'.*choose auto, cpu, gpu, npu, coreml"
    ):
        edgevlm.load(paligemma_bundle.folder, device="tpu")


def test_a_decoder_that_is_none_or_another(paligemma_bundle: Bundle, tmp_path: Path) -> None:
    manifest = paligemma_bundle.manifest
    path = tmp_path / "decoder.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BundleCorrupt, match="not a GGUF file that can be read"):
        LlamaDecoder(path, manifest.decoder, manifest.token_embedding, threads=1)
    other = dataclasses.replace(manifest.decoder, n_embd=99)
    with pytest.raises(BundleCorrupt, match="another decoder"):
        LlamaDecoder(paligemma_bundle.path("decoder"), other, manifest.token_embedding, threads=1)
    place = dataclasses.replace(manifest.token_embedding, offset=10**9)
    with pytest.raises(BundleCorrupt, match="beyond its end"):
        LlamaDecoder(paligemma_bundle.path("decoder"), manifest.decoder, place, threads=1)


def run(
    bundle: Bundle, *arguments: str, start: tuple[str, ...] = ("-m", "edgevlm")
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *start, *arguments, "-m", str(bundle.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(__file__).parent.parent,
    )


# onnxruntime says so of processors that it has not heard of; nobody can do anything about it.
UNKNOWN = "onnxruntime cpuid_info warning: Unknown CPU vendor"


def test_the_command_line_on_real_engines_is_quiet(
    paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    picture = str(tmp_path / "in.png")
    child = run(paligemma_bundle, "ask", "caption en", "-i", picture, "--max-tokens", "4")
    out, err = child.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith(UNKNOWN)]
    assert (child.returncode, said) == (0, ["Cut at 4 tokens; --max-tokens raises the limit."])
    assert out.strip()


# The command line, which says when its decoder begins to read.
ANNOUNCED = """
import sys
from edgevlm import cli
from edgevlm.runtimes.llama.decoder import LlamaDecoder
prefill = LlamaDecoder.prefill
def announced(*arguments, **options):
    print("prefill", file=sys.stderr, flush=True)
    return prefill(*arguments, **options)
LlamaDecoder.prefill = announced
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_the_program_during_a_prefill(paligemma_bundle: Bundle, vlm: VLM) -> None:
    child = run(paligemma_bundle, "ask", prefix_of(vlm, 4000), start=("-c", ANNOUNCED))
    assert child.stderr
    first = next(line for line in child.stderr if not line.startswith(UNKNOWN))
    assert first == "prefill\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert "Traceback" not in err


def test_ctrl_c_while_a_model_is_loaded_is_heard(
    paligemma_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp calls Python with its messages, where ctypes would drop the exception."""

    interrupted = llama.llama_log_callback(lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(ggml, "_collect", interrupted)
    manifest = paligemma_bundle.manifest
    with pytest.raises(KeyboardInterrupt):
        LlamaDecoder(
            paligemma_bundle.path("decoder"), manifest.decoder, manifest.token_embedding, threads=1
        )
    monkeypatch.undo()
    ggml.quiet()


# Tokens, and how they see one another.
Words = tuple[list[int], BlockAttention]


def blocks_of(decoder: TextDecoder, *parts: Words) -> list[Block]:
    """Blocks one after the other: (tokens, attention)."""
    blocks: list[Block] = []
    for tokens, attention in parts:
        start = sum(len(block.rows) for block in blocks)
        blocks.append(sequential(decoder.embed(tokens), attention, start))
    return blocks


def test_blocks_see_what_comes_before_them_and_their_own_rows(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    before, picture, after = (decoder.tokenize(t) for t in ("a b c", "the quick fox", "and now"))
    both_ways = blocks_of(
        decoder, (before, "causal"), (picture, "bidirectional"), (after, "causal")
    )
    decoder.prefill(both_ways, room=1)
    mixed = decoder.logits()
    # One token after the other is causal, whatever came before.
    decoder.prefill(both_ways[:2], room=len(after))
    assert np.abs(decoder.extend(after)[-1] - mixed).max() < EXACT
    causal = blocks_of(decoder, (before + picture + after, "causal"))
    decoder.prefill(causal, room=1)
    one_way = decoder.logits()
    assert np.abs(one_way - mixed).max() > 100 * EXACT
    # A block of one row sees the same both ways.
    last = picture[1:] + after
    single: list[Words] = [(before, "causal"), (picture[:1], "bidirectional"), (last, "causal")]
    decoder.prefill(blocks_of(decoder, *single), room=1)
    assert np.abs(decoder.logits() - one_way).max() < EXACT


def test_the_kv_cache_of_equal_leading_blocks_is_kept(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    words = [decoder.tokenize(t) for t in ("a b c", "the quick fox", "and now", "or then")]

    def read(*parts: Words) -> tuple[int, Float]:
        kept = decoder.prefill(blocks_of(decoder, *parts), room=1)
        return kept, decoder.logits()

    start: Words = (words[0], "causal")
    seen: Words = (words[1], "bidirectional")
    decoder.clear()
    assert read(start, seen, (words[2], "causal"))[0] == 0
    kept, again = read(start, seen, (words[3], "causal"))
    assert kept == len(words[0]) + len(words[1])
    # The same rows, read otherwise, are others.
    assert read(start, (words[1], "causal"), (words[3], "causal"))[0] == len(words[0])
    decoder.clear()
    assert np.array_equal(read(start, seen, (words[3], "causal"))[1], again)


def test_positions_that_do_not_follow_are_refused(vlm: VLM) -> None:
    decoder = vlm.engines.decoder
    rows = decoder.embed(decoder.tokenize("a b c d"))
    for positions in ([0, 1, 3, 4], [1, 2, 3, 4], [0, 1, 1, 2], [0, 1]):
        block = Block(rows[:4], "causal", np.array(positions, np.int32))
        with pytest.raises(EngineError, match="positions"):
            decoder.prefill([block], room=1)
    with pytest.raises(EngineError, match="no rows"):
        decoder.prefill([], room=1)


def test_settings_say_what_runs(paligemma_bundle: Bundle) -> None:
    with edgevlm.load(paligemma_bundle.folder, threads=1, repack=False) as loaded:
        assert loaded.settings == RunSettings(
            1, "off", "f32", "off", prefill_threads=1, vision_threads=1
        )
        loaded.ask("caption en", PICTURE, max_tokens=2)
        ran = loaded.settings
    assert ran.context >= ran.batch >= loaded.manifest.image.tokens
    for kv, flash in (("f16", {"on", "off"}), ("q8_0", {"on"})):
        with edgevlm.load(kv=kv) as pico:
            pico.ask("caption en", max_tokens=1)
            assert pico.settings.kv == kv and pico.settings.flash_attention in flash
