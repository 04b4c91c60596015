"""A limit of memory: what fits it, what is refused, and the same answers within it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.cli import cli
from edgevlm.errors import EngineError, ModelClosed, PromptError
from edgevlm.machine import Memory
from edgevlm.models import built_in
from edgevlm.runtimes import loading
from edgevlm.runtimes.budget import Budget, MemoryLimit, Needs, fitted, limit_of, needs
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.memory import peak_bytes
from edgevlm.runtimes.vision.encoder import OrtEncoder

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
GREY = np.full((40, 60, 3), 128, np.uint8)
QUESTION = "answer en what shape is red?"
GB = 10**9
BIG = Needs(vision=GB, vocabulary=0, weights=2 * GB, position=1000, work=0, usual=256)


def within(size: int) -> MemoryLimit | None:
    return limit_of(size, None, threads=2)


def pico() -> Needs:
    return needs(open_bundle(built_in()), "int8", "f16")


def one_at_a_time() -> int:
    """A limit that has room for pico's engines in turn and not for both."""
    found = pico()
    return found.peak(found.usual, "off", apart=True)


def test_two_orders_of_the_weights_map_the_file_twice() -> None:
    sizes = [BIG.decoder(100, repacking) for repacking in ("off", "on", "decode")]
    assert sizes[1] - sizes[0] == BIG.weights
    assert sizes[2] - sizes[1] == BIG.weights + 256 * BIG.position


@pytest.mark.parametrize(
    ("limit", "apart", "repacking"),
    [(6, False, "on"), (4, False, "off"), (3, True, "off")],
)
def test_the_quickest_way_that_fits(limit: int, apart: bool, repacking: str) -> None:
    way = fitted(BIG, "on", within(limit * GB), machine=0)
    assert (way.apart, way.repacking, way.limit) == (apart, repacking, within(limit * GB))
    assert BIG.peak(256, way.repacking, apart=way.apart) <= limit * GB


def test_weights_are_not_re_ordered_anew_for_every_picture() -> None:
    large = Needs(vision=4 * GB, vocabulary=0, weights=GB, position=0, work=0, usual=1)
    way = fitted(large, "on", within(4_500_000_000), machine=0)
    assert (way.apart, way.repacking) == (True, "off")


def test_a_limit_that_is_too_small_is_refused_with_numbers() -> None:
    with pytest.raises(EngineError) as refused:
        fitted(BIG, "on", within(GB), machine=64 * GB)
    text = str(refused.value)
    assert text.startswith("max_memory is 1.00 GB and this model needs about 2.25 GB (encoder 1.00")
    assert "then decoder 2.01 GB); raise max_memory, lower max_tiles or max_pixels, or take" in text


def test_without_a_limit_it_is_the_machines_memory_and_nothing_is_refused() -> None:
    for machine, apart in ((8, False), (3, True), (1, True)):
        way = fitted(BIG, "off", None, machine * GB)
        assert (way.apart, way.limit) == (apart, None)
        way.check(10**9)


def test_a_request_beyond_the_limit_is_refused_with_numbers() -> None:
    way = Budget(BIG, within(3 * GB), apart=True, repacking="off")
    way.check(256)
    with pytest.raises(PromptError, match=r"needs about 3.25 GB of memory for 1000000 tokens and"):
        way.check(1_000_000)


def test_addresses_that_are_left_are_a_limit_too() -> None:
    plenty, scarce = 100 * GB, GB
    assert limit_of(None, None, threads=8) is None
    assert limit_of(GB, plenty, threads=2) == limit_of(GB, None, threads=2)
    left = [limit.bytes for n in (1, 2, 8) if (limit := limit_of(2 * GB, scarce, threads=n))]
    assert 2 * GB > left[0] > left[1] > left[2] == 0
    with pytest.raises(EngineError, match=r"ulimit -v\) leaves .* at threads=2 and .* needs"):
        fitted(BIG, "on", limit_of(None, scarce, threads=2), machine=64 * GB)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """States of a model: had encoder and decoder their weights, whenever one of them worked?"""
    found: list[tuple[bool, bool]] = []
    engines: dict[str, Any] = {}
    features, prefill, load = OrtEncoder.features, LlamaDecoder.prefill, LlamaDecoder.__init__

    def state() -> None:
        found.append((bool(engines["encoder"]._sessions), engines["decoder"]._model is not None))

    def noted_features(self: OrtEncoder, pixels: Any) -> Any:
        engines["encoder"] = self
        result = features(self, pixels)
        if "decoder" in engines:
            state()
        return result

    def noted_prefill(self: LlamaDecoder, *args: Any, **options: Any) -> Any:
        result = prefill(self, *args, **options)
        state()
        return result

    def noted_load(self: LlamaDecoder, *args: Any, **options: Any) -> None:
        engines["decoder"] = self
        load(self, *args, **options)

    monkeypatch.setattr(OrtEncoder, "features", noted_features)
    monkeypatch.setattr(LlamaDecoder, "prefill", noted_prefill)
    monkeypatch.setattr(LlamaDecoder, "__init__", noted_load)
    return found


def test_one_engine_at_a_time_gives_the_same_answers(held: list[tuple[bool, bool]]) -> None:
    asked: list[tuple[str, Any]] = [
        (QUESTION, SHAPES),
        ("caption en", GREY),
        ("caption en", SHAPES),
        (QUESTION, None),
    ]
    with edgevlm.load(repack=False) as vlm:
        assert not vlm.settings.apart
        expected = [vlm.ask(*question).token_ids for question in asked]
    held.clear()
    with edgevlm.load(max_memory=one_at_a_time()) as vlm:
        assert vlm.settings.apart and vlm.settings.repacking == "off"
        assert [vlm.ask(*question).token_ids for question in asked] == expected
        vlm.forget()
        assert vlm.ask(*asked[0]).token_ids == expected[0]
        assert vlm.score(QUESTION, ["circle", "star"], SHAPES).argmax() == 0
    assert (True, True) not in held
    assert held.count((True, False)) == 3 and held.count((False, True)) == 6


def test_the_first_picture_is_encoded_before_any_weights_of_the_decoder_are_there(
    held: list[tuple[bool, bool]],
) -> None:
    with edgevlm.load(max_memory=one_at_a_time(), image=str(SHAPES)) as vlm:
        with vlm.chat(str(SHAPES)) as chat:
            assert [chat.ask(QUESTION).text for _ in range(2)] == ["circle", "circle"]
    assert held == [(False, True)] * 2


def test_what_is_remembered_needs_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[tuple[bool, bool]]
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE")
    for _ in range(2):
        with edgevlm.load(max_memory=one_at_a_time()) as vlm:
            assert vlm.ask(QUESTION, SHAPES).text == "circle"
    assert held == [(True, False), (False, True), (False, True)]


def test_threads_take_turns_with_the_memory_too() -> None:
    with edgevlm.load(max_memory=one_at_a_time()) as vlm:
        alone, rows = vlm.ask("caption en", SHAPES).text, vlm.image_embeddings(GREY)
        found: list[bool] = []

        def embed() -> None:
            for _ in range(3):
                vlm.engines.cache.clear()
                found.append(np.array_equal(vlm.image_embeddings(GREY), rows))

        def ask() -> None:
            found.extend(vlm.ask("caption en", SHAPES).text == alone for _ in range(3))

        threads = [threading.Thread(target=work) for work in (embed, ask, embed, ask)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 12


@pytest.mark.fault("Python", "a model closed while its parts take turns in memory", "stays closed")
def test_a_closed_model_loads_nothing_again() -> None:
    vlm = edgevlm.load(max_memory=one_at_a_time())
    vlm.ask(QUESTION, SHAPES)
    encoder, decoder = vlm.engines.encoder, vlm.engines.decoder
    vlm.close()
    with pytest.raises(ModelClosed):
        vlm.ask(QUESTION, SHAPES)
    with pytest.raises(ModelClosed):
        encoder.features(np.zeros((1, 3, 8, 8), np.float32))
    for use in (decoder.clear, lambda: decoder.tokenize("a"), lambda: decoder.step(5)):
        with pytest.raises(ModelClosed):
            use()


def test_a_container_that_is_too_small_for_both_has_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "memory", lambda: Memory(one_at_a_time(), 0))
    with edgevlm.load() as vlm:
        assert vlm.settings.apart and vlm.ask(QUESTION, SHAPES).text == "circle"
    monkeypatch.setattr(loading, "memory", lambda: Memory(1, 0))
    with edgevlm.load() as vlm:  # nobody asked for a limit, so nothing is refused
        assert vlm.ask(QUESTION, SHAPES).text == "circle"


def test_an_answer_that_would_need_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with edgevlm.load(max_memory=one_at_a_time()) as vlm:
        monkeypatch.setattr(Needs, "decoder", lambda *_: 1 << 40)
        with pytest.raises(PromptError, match="max_memory is .* max_tokens, max_tiles or max_pix"):
            vlm.stream(QUESTION, SHAPES)


def test_estimates_are_bounds_of_what_this_process_holds() -> None:
    with edgevlm.load() as vlm:
        vlm.ask(QUESTION, SHAPES)
    found = pico()
    weights = sum(p.stat().st_size for p in built_in().glob("decoder.gguf"))
    assert found.weights == weights
    assert 0 < found.vision < peak_bytes() and found.usual <= 1024
    assert found.peak(256, "on", apart=False) > found.peak(256, "off", apart=False)
    assert needs(open_bundle(built_in()), "int8", "q8_0").position < found.position


def test_the_command_takes_it_and_refuses_with_one_line() -> None:
    run = CliRunner()
    command = ["ask", "-m", "pico", QUESTION, "-i", str(SHAPES), "--max-memory"]
    fits = run.invoke(cli, [*command, str(one_at_a_time())])
    assert (fits.exit_code, fits.stdout) == (0, "circle\n")
    refused = run.invoke(cli, [*command, "50MB"])
    assert isinstance(refused.exception, EngineError)
    wrong = run.invoke(cli, [*command, "lots"])
    assert wrong.exit_code == 2 and "'lots' is not a size; write one such as" in wrong.stderr


@pytest.mark.parametrize("size", ["lots", -1, ""])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(PromptError, match="is not a size; write one such as 500MB"):
        edgevlm.load(max_memory=size)
