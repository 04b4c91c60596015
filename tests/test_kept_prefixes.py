"""KV caches of pictures on disk: the same logits to the last bit, in another load of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm import VLM, disk_cache
from edgevlm.export import export_bundle
from edgevlm.prompt import Exchange
from edgevlm.runtimes import prefixes, shelves
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.sampling import Sampling
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.llava_next import write_next
from tests.checkpoints.llava_onevision import write_onevision
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.phi3_v import write_phi3_v
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv

pytestmark = pytest.mark.usefixtures("children_inside")

A, B = np.random.default_rng(3).integers(0, 256, (2, 50, 90, 3), np.uint8)
CAUSAL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llava": (write_llava, "q8_0"),
    "llava-f32": (write_llava, "f32"),
    "smolvlm": (write_smolvlm, "f16"),
    "gemma3": (partial(write_gemma3, window=512), "f16"),
    "internvl": (write_internvl, "q4_k_m"),
    "deepseek-vl": (write_deepseek_vl, "q8_0"),
    "llava-next": (write_next, "q8_0"),
    "onevision": (write_onevision, "q8_0"),
    "phi3-v": (write_phi3_v, "f16"),
    "qwen2-vl": (write_qwen2_vl, "q8_0"),
    "tinygptv": (partial(write_tinygptv, stage=4), "f16"),
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE")
    # Tiny models read pictures of few rows.
    monkeypatch.setattr(prefixes, "MIN_ROWS", 1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(write_llava, tmp_path_factory.mktemp("llava"))


def exported(write: Callable[[Path], Path], folder: Path, quant: str = "q8_0") -> Path:
    source, out = write(folder / "source"), folder / "out"
    return export_bundle(source, out, quant=quant, vision_precision="fp32", verify=False).folder


def logits(
    vlm: VLM, asked: Sequence[Exchange], images: Sequence[np.ndarray]
) -> tuple[Float, int, int]:
    """Logits float32 [4, n_vocab] after the prefix and three tokens, rows kept, rows read."""
    model = vlm.engines
    request = prepare(model, asked, images, Sampling(max_tokens=8))
    prefill(model, request, input_blocks(model, request), 8)
    found = [model.decoder.logits()]
    for token in (5, 6, 7):
        model.decoder.step(token)
        found.append(model.decoder.logits())
    model.keep()
    assert np.array_equal(found[-1], model.decoder.logits())
    return np.stack(found), request.n_kept, request.n_image + request.n_text


def newest() -> Path:
    """The entry that was written last: the KV cache of an answer about a new picture."""
    return max(disk_cache.pictures_folder().folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_restored_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    write, quant = CAUSAL[name]
    folder = exported(write, tmp_path, quant)
    first, other = [Exchange("what is it?", 1)], [Exchange("and where is that?", 1)]
    with edgevlm.load(folder, cache=False) as vlm:
        turn = vlm.manifest.prompt.turn
        pictures = min(2, vlm.manifest.image.max_pictures)
        several = [Exchange("compare them", pictures)]
        expected = [logits(vlm, other, [A])]
        vlm.forget()
        expected.append(logits(vlm, several, [B, A][:pictures]))
    with edgevlm.load(folder) as vlm:
        assert logits(vlm, first, [A])[1] == 0
        reply = vlm.ask("what is it?", A, max_tokens=3)
        assert reply.tokens.kept > reply.tokens.image / 2
    with edgevlm.load(folder) as vlm:
        found, kept, read = logits(vlm, other, [A])
        assert reply.tokens.kept == kept and 0 < kept < read
        assert np.array_equal(found, expected[0][0])
        logits(vlm, several, [B, A][:pictures])
    with edgevlm.load(folder) as vlm:
        found, kept, _ = logits(vlm, several, [B, A][:pictures])
        assert kept > 0 and np.array_equal(found, expected[1][0])
    if turn:
        asked = [Exchange("what is it?", 1, reply), Exchange("sure?")]
        with edgevlm.load(folder, cache=False) as vlm:
            fresh, _, _ = logits(vlm, asked, [A])
        with edgevlm.load(folder) as vlm:
            found, kept, _ = logits(vlm, asked, [A])
        assert kept > 0 and np.array_equal(found, fresh)


def test_counts_of_an_answer_say_what_was_not_read(llava: Path) -> None:
    with edgevlm.load(llava) as vlm:
        first = vlm.ask("what is it?", A, max_tokens=3)
    with edgevlm.load(llava) as vlm:
        again = vlm.ask("what is it?", A, max_tokens=3)
        third = vlm.ask("what is it?", A, max_tokens=3)
    assert (first.tokens.cached, first.tokens.kept) == (0, 0)
    assert again.tokens.cached == again.tokens.kept > again.tokens.image
    assert third.tokens == again.tokens and third.token_ids == again.token_ids == first.token_ids


def test_a_chat_goes_on_after_its_prefix_was_kept(llava: Path) -> None:
    told = []
    for cache in (False, True, True):
        with edgevlm.load(llava, cache=cache) as vlm, vlm.chat(A) as chat:
            told.append([chat.ask(q, max_tokens=4).token_ids for q in ("what?", "why?", "so?")])
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("damage", ["truncated", "a bit", "refused"])
def test_a_state_that_is_no_use_is_computed_anew(
    llava: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgevlm.load(llava) as vlm:
        first = vlm.ask("what is it?", A, max_tokens=3)
    path = newest()
    data = path.read_bytes()
    given = []

    def refuse(*_: object) -> int:
        given.append(1)
        return 0

    if damage == "refused":  # as by another llama.cpp that calls itself the same
        monkeypatch.setattr(llama, "llama_state_seq_set_data", refuse)
    else:
        bit = data[:900] + bytes([data[900] ^ 4]) + data[901:]
        path.write_bytes({"truncated": data[:-1], "a bit": bit}[damage])
    with edgevlm.load(llava) as vlm:
        again = vlm.ask("what is it?", A, max_tokens=3)
    assert again.tokens.kept == 0 and again.token_ids == first.token_ids
    assert bool(given) == (damage == "refused")
    monkeypatch.undo()
    assert path.read_bytes() == data


def test_other_settings_have_states_of_their_own(llava: Path) -> None:
    for settings in ({}, {"kv": "q8_0"}, {"threads": 3, "kv": "f16"}):
        for kept in (False, True):
            with edgevlm.load(llava, **settings) as vlm:
                assert bool(vlm.ask("what is it?", A, max_tokens=1).tokens.kept) == kept


def test_a_copy_that_draws_tokens_shares_the_states_of_the_one_that_reads(llava: Path) -> None:
    with edgevlm.load(llava, repack=False) as vlm:
        first = vlm.ask("what is it?", A, max_tokens=4)
        next_one = vlm.ask("and why?", A, max_tokens=4)
    with edgevlm.load(llava, repack="decode") as vlm:
        again = vlm.ask("what is it?", A, max_tokens=4)
        assert again.tokens.kept > again.tokens.image and again.token_ids == first.token_ids
        assert vlm.ask("and why?", A, max_tokens=4).token_ids == next_one.token_ids
    with edgevlm.load(llava, repack=True) as vlm:
        assert vlm.ask("what is it?", A, max_tokens=1).tokens.kept == 0


def test_another_decoder_or_build_has_states_of_its_own(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.runtimes.llama import ggml

    with edgevlm.load(llava) as vlm:
        vlm.ask("what is it?", A, max_tokens=1)
    hashes = shelves._hashes
    monkeypatch.setattr(ggml, "build", lambda: "another")
    with edgevlm.load(llava) as vlm:
        assert vlm.ask("what is it?", A, max_tokens=1).tokens.kept == 0
    monkeypatch.undo()
    monkeypatch.setattr(shelves, "_hashes", lambda c: tuple(h[::-1] for h in hashes(c)))
    with edgevlm.load(llava) as vlm:
        assert vlm.ask("what is it?", A, max_tokens=1).tokens.kept == 0


def test_forget_reads_every_row_anew(llava: Path) -> None:
    for _ in range(2):
        with edgevlm.load(llava) as vlm:
            first = vlm.ask("what is it?", A, max_tokens=1)
            vlm.forget()
            again = vlm.ask("what is it?", A, max_tokens=1)
            assert (again.tokens.cached, again.tokens.kept) == (0, 0)
            assert vlm.ask("what is it?", A, max_tokens=1).tokens.kept > 0
    assert first.tokens.kept > 0


def test_few_rows_are_read_again_and_a_prefix_lm_keeps_none(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "MIN_ROWS", 1000)
    paligemma = exported(write_paligemma, tmp_path)
    for folder in (llava, paligemma):
        for _ in range(2):
            with edgevlm.load(folder) as vlm:
                reply = vlm.ask("what is it?", A, max_tokens=1)
        assert reply.tokens.cached == reply.tokens.image and reply.tokens.kept == 0
    assert len([*disk_cache.pictures_folder().folder.iterdir()]) == 2


@pytest.mark.fault(
    "Python",
    "an answer that is broken off",
    "leaves nothing that another answer could see",
)
def test_a_broken_off_answer_keeps_no_state_and_disturbs_nobody(llava: Path) -> None:
    with edgevlm.load(llava) as vlm:
        broken = vlm.stream("what is it?", A, max_tokens=9)
        next(broken)
        del broken
        whole = vlm.ask("and here?", B, max_tokens=3)
    with edgevlm.load(llava, cache=False) as vlm:
        assert vlm.ask("and here?", B, max_tokens=3).token_ids == whole.token_ids


def test_a_score_keeps_its_picture(llava: Path) -> None:
    scores = []
    for _ in range(2):
        with edgevlm.load(llava) as vlm:
            scores.append(vlm.score("what is it?", ["a", "the"], A))
    with edgevlm.load(llava) as vlm:
        assert vlm.ask("what is it?", A, max_tokens=1).tokens.kept > 0
    assert np.array_equal(scores[0], scores[1])
