"""Pictures whose rows see one another inside causal text, and layers that see only a window of it:
what is read at once, and what of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.export import export_bundle
from edgevlm.prompt import Exchange
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests.answers import greedy
from tests.checkpoints.gemma3 import write_gemma3

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(5)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (150, 40, 3), np.uint8)
# One that pan and scan cuts into three.
LONG = RNG.integers(0, 256, (260, 800, 3), np.uint8)
# More than the window has positions, twice.
LENGTHY = "what is there beside the red circle and the blue square? " * 4
# A picture, and what stands before it in every question.
LEADING = 16 + 7
# The context grows on the way.
TURNS = [Exchange(LENGTHY, 1, "a cat"), Exchange(LENGTHY * 3, 0, "a dog"), Exchange("why?")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 whose pictures take 16 rows, with layers that see 24 positions."""
    folder = tmp_path_factory.mktemp("blocks")
    source, out = write_gemma3(folder / "source"), folder / "out"
    return export_bundle(source, out, quant="f32", vision_precision="fp32", verify=False).folder


def asked(vlm: VLM, exchanges: Sequence[Exchange], *pictures: Any) -> tuple[Float, int]:
    """Logits of an answer of four tokens, and the rows that were not read again."""
    request = prepare(vlm.engines, exchanges, pictures, Sampling(max_tokens=4))
    logits, _ = greedy(vlm, request, 4)
    vlm.engines.keep()
    return logits, request.n_kept


@pytest.fixture(scope="module")
def fresh(bundle: Path) -> Float:
    """Logits after TURNS, read at one go."""
    with edgevlm.load(bundle, threads=1, cache=False) as vlm:
        return asked(vlm, TURNS, WIDE)[0]


def test_each_tile_is_a_block_of_its_own(bundle: Path) -> None:
    with edgevlm.load(bundle, threads=1, max_tiles=3) as vlm:
        request = prepare(vlm.engines, [Exchange("a", 2)], [WIDE, LONG], Sampling())
        blocks = input_blocks(vlm.engines, request)
        both = [len(b.rows) for b in blocks if b.attention == "bidirectional"]
        # One and, after the whole, two parts; texts around them.
        assert both == [16] * 4 and len(blocks) == 9
        n = request.n_image + request.n_text
        assert np.concatenate([b.positions for b in blocks]).tolist() == list(range(n))


def test_a_block_is_read_at_once_whatever_the_batch(bundle: Path) -> None:
    with edgevlm.load(bundle, threads=1, cache=False) as vlm:
        whole, _ = asked(vlm, [Exchange(LENGTHY, 1)], WIDE)
        decoder: Any = vlm.engines.decoder
        decoder.adjust(1, 1, 5, "off")
        parts, kept = asked(vlm, [Exchange(LENGTHY, 1)], WIDE)
    assert kept == 0 and np.abs(whole - parts).max() < 1e-3


def test_what_was_read_is_kept(bundle: Path) -> None:
    other = [Exchange("another one", 1)]
    with edgevlm.load(bundle, threads=1, cache=False) as vlm:
        new, kept = asked(vlm, other, WIDE)
        assert kept == 0
        asked(vlm, [Exchange("one", 1)], WIDE)
        again, kept = asked(vlm, other, WIDE)
        assert kept == LEADING and np.array_equal(again, new)
        # Of another picture the words before it.
        assert asked(vlm, other, TALL)[1] == LEADING - 16


def test_a_block_that_is_not_whole_is_not_there(bundle: Path) -> None:
    question = [Exchange("one", 1)]
    with edgevlm.load(bundle, threads=1, cache=False) as vlm:
        new, _ = asked(vlm, question, WIDE)
        vlm.engines.decoder.rollback(LEADING - 1)
        again, kept = asked(vlm, question, WIDE)
        assert kept == LEADING - 16 and np.array_equal(again, new)


@pytest.mark.parametrize("repack", [None, "decode"])
def test_an_answer_that_was_drawn_is_not_read_again(
    bundle: Path, fresh: Float, repack: Any
) -> None:
    """Also where the context grows, and where another decoder of the file drew it."""
    with edgevlm.load(bundle, threads=1, repack=repack, cache=False) as vlm:
        read = 0
        for n, turn in enumerate(TURNS):
            so_far = [*TURNS[:n], Exchange(turn.question, turn.n_pictures)]
            request = prepare(vlm.engines, so_far, [WIDE], Sampling(max_tokens=4))
            if turn.answer is None:
                logits, _ = greedy(vlm, request, 4)
                assert request.n_kept == read
                break
            prefill(vlm.engines, request, input_blocks(vlm.engines, request), 8)
            assert request.n_kept == read
            drawn = vlm.engines.tokenize(str(turn.answer))
            for token in drawn:
                vlm.engines.decoder.step(token)
            read = request.n_image + request.n_text + len(drawn)
    assert np.abs(logits - fresh).max() < 2e-3


@pytest.mark.parametrize("repack", [None, "decode"])
def test_what_lies_behind_a_window_is_not_built_on(
    bundle: Path, fresh: Float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repack: Any
) -> None:
    """A KV cache of llama.cpp's that was copied lacks what windows see no more, so that a question
    which goes back further is read anew, from what is on disk.
    """
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE", raising=False)
    monkeypatch.setattr("edgevlm.runtimes.prefixes.MIN_ROWS", 1)
    with edgevlm.load(bundle, threads=1, cache=False) as vlm:
        new, _ = asked(vlm, [Exchange("new", 1)], WIDE)
    for known in (0, LEADING):
        with edgevlm.load(bundle, threads=1, repack=repack, cache=True) as vlm:
            for n in range(3):
                so_far = [*TURNS[:n], Exchange(TURNS[n].question, TURNS[n].n_pictures)]
                logits, kept = asked(vlm, so_far, WIDE)
                assert kept == (LEADING if n else known)
            assert np.abs(logits - fresh).max() < 2e-3
            short, kept = asked(vlm, [Exchange("new", 1)], WIDE)
            assert kept == LEADING and np.abs(short - new).max() < 2e-3
