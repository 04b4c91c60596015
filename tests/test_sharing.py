"""One model in many hands: threads that take turns, close and drop it, processes that fork."""

import dataclasses
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

import edgevlm
from edgevlm import VLM, Chat
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleCorrupt, EdgeVLMError, ModelClosed, PromptError
from edgevlm.models import built_in
from edgevlm.runtimes import fakes, turns
from edgevlm.runtimes.llama import decoder
from edgevlm.runtimes.llama.bindings import llama

T = TypeVar("T")
PICTURE = Path(__file__).parent.parent / "examples" / "shapes.png"
RED = np.full((10, 20, 3), (255, 0, 0), np.uint8)
CAPTION = "a red circle, a blue square, a yellow triangle and a green star"


def in_thread(call: Callable[[], T]) -> T:
    """What the call returns or raises, in a thread that has to end."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def run(script: str, *, without: tuple[str, ...] = ()) -> str:
    """The output of a Python program of its own, which has to end well and in time."""
    environment = {k: v for k, v in os.environ.items() if k not in without}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment | {"PICTURE": str(PICTURE)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USES: dict[str, Callable[[VLM, Chat], object]] = {
    "ask": lambda v, c: v.ask("caption en", PICTURE),
    "stream": lambda v, c: next(v.stream("caption en", PICTURE)),
    "chat": lambda v, c: c.ask("caption en"),
    "new chat": lambda v, c: v.chat(PICTURE),
    "caption": lambda v, c: v.caption(PICTURE),
    "detect": lambda v, c: v.detect("circle", PICTURE),
    "ocr": lambda v, c: v.ocr(PICTURE),
    "score": lambda v, c: v.score("caption en", ["a"], PICTURE),
    "image_embeddings": lambda v, c: v.image_embeddings(PICTURE),
    "forget": lambda v, c: v.forget(),
    "with": lambda v, c: v.__enter__(),
    "tokenize": lambda v, c: v.engines.decoder.tokenize("a"),
    "piece": lambda v, c: v.engines.decoder.piece(5),
    "step": lambda v, c: v.engines.decoder.step(5),
    "logits": lambda v, c: v.engines.decoder.logits(),
    "clear": lambda v, c: v.engines.decoder.clear(),
    "rollback": lambda v, c: v.engines.decoder.rollback(1),
    "features": lambda v, c: v.engines.encoder.features(np.zeros((1, 3, 192, 192), np.float32)),
}


@pytest.fixture(scope="module")
def closed() -> tuple[VLM, Chat]:
    with edgevlm.load() as vlm:
        chat = vlm.chat(PICTURE)
        chat.ask("caption en", max_tokens=1)
    return vlm, chat


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_model_says_so(
    closed: tuple[VLM, Chat], use: Callable[[VLM, Chat], object]
) -> None:
    with pytest.raises(ModelClosed, match="closed; load"):
        use(*closed)


def test_what_needs_no_engine_still_works_on_a_closed_model(closed: tuple[VLM, Chat]) -> None:
    vlm, chat = closed
    vlm.close()
    vlm.cancel()
    assert chat.reply.text == "a"
    assert vlm.task("ocr") == "ocr"
    with chat:
        pass


def test_an_open_answer_and_its_sampler_outlive_the_model() -> None:
    with edgevlm.load() as vlm:
        answer = vlm.stream("caption en", PICTURE)
        next(answer)
    with pytest.raises(ModelClosed):
        next(answer)
    assert list(answer) == []
    assert answer.reply.text == "a"
    del answer
    gc.collect()


@pytest.mark.fault("Python", "a load that fails half-way", "what was loaded is freed")
def test_a_model_whose_load_fails_half_way_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    free = llama.llama_model_free

    def noted(model: object) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(llama, "llama_model_free", noted)
    bundle = open_bundle(built_in())
    spec = dataclasses.replace(bundle.manifest.decoder, n_layer=99)
    with pytest.raises(BundleCorrupt, match="another decoder"):
        decoder.LlamaDecoder(
            bundle.path("decoder"), spec, bundle.manifest.token_embedding, threads=1
        )
    gc.collect()
    assert len(freed) == 1


def test_models_that_nobody_closes_are_freed() -> None:
    grown = run(
        """
        import os, psutil, edgevlm
        def rss(): return psutil.Process().memory_info().rss
        for i in range(16):
            vlm = edgevlm.load()
            answer = vlm.stream("caption en", os.environ["PICTURE"])
            next(answer)
            del vlm, answer
            if i == 3:
                start = rss()
        print((rss() - start) >> 20)
        """
    )
    assert int(grown) < 25  # seven megabytes each before


def test_threads_are_answered_one_after_the_other() -> None:
    with edgevlm.load() as vlm, ThreadPoolExecutor(4) as pool:
        alone = vlm.image_embeddings(PICTURE)
        score = vlm.score("caption en", ["a red"], PICTURE)
        jobs: list[tuple[Future[Any], Callable[[Any], bool]]] = []
        for _ in range(4):
            jobs += [
                (pool.submit(vlm.ask, "caption en", PICTURE), lambda r: r.text == CAPTION),
                (pool.submit(embedded_afresh, vlm), lambda r: np.array_equal(r, alone)),
                (pool.submit(vlm.score, "caption en", ["a red"], PICTURE), lambda r: r == score),
                (pool.submit(vlm.detect, "circle", PICTURE), lambda r: r[0].label == "circle"),
                (pool.submit(vlm.forget), lambda r: r is None),
            ]
        assert all(right(job.result()) for job, right in jobs)


def test_an_answer_keeps_its_turn_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "IDLE_S", 3600)
    vlm = fakes.vlm(["abcdef", "xyz"])
    answer = vlm.stream("x")
    said = [next(answer).text]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(vlm.ask, "y")
        while len(vlm._turns._waiting) < 1:
            assert not other.done()
        said += [piece.text for piece in answer]
        assert other.result(timeout=60).text == "xyz"
    assert "".join(said) == "abcdef"


def test_waiting_requests_are_answered_in_the_order_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "IDLE_S", 3600)
    vlm, order = fakes.vlm("a"), []
    answer = vlm.stream("x")
    next(answer)

    def ask(i: int) -> None:
        vlm.ask("y")
        order.append(i)

    threads = []
    for i in range(5):
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
        while len(vlm._turns._waiting) <= i:
            pass
    answer.finish()
    for thread in threads:
        thread.join(60)
    assert order == sorted(order)


@pytest.mark.parametrize("end", ["drop", "break", "cancel", "interrupt"])
def test_an_answer_that_ends_early_lets_the_others_through_at_once(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(turns, "IDLE_S", 3600)
    vlm = fakes.vlm(["abcdef", "xyz"])
    if end == "break":
        for _ in vlm.stream("x"):
            break
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            for _ in vlm.stream("x"):
                raise KeyboardInterrupt
    else:
        answer = vlm.stream("x")
        next(answer)
        if end == "cancel":
            answer.cancel()
            assert list(answer) == []
        del answer
    assert in_thread(lambda: vlm.ask("y")).text == "xyz"


def test_an_answer_that_is_kept_and_not_drawn_gives_up_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "IDLE_S", 0.1)
    vlm = fakes.vlm(["abcdef", "xyz"])
    answer = vlm.stream("x")
    next(answer)
    assert in_thread(lambda: vlm.ask("y")).text == "xyz"
    with pytest.raises(PromptError, match="asked something else"):
        next(answer)


def test_an_answer_drawn_in_several_threads_is_not_given_up_for_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a web server draws one: each piece in whichever thread of its pool is free."""
    monkeypatch.setattr(turns, "IDLE_S", 3600)
    vlm = fakes.vlm(["abcd", "xyz"])
    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:
        answer = vlm.stream("x")
        pieces = [pool.submit(next, answer).result(60).text for pool in (a, b, a)]
        other = a.submit(vlm.ask, "y")
        while len(vlm._turns._waiting) < 1:
            assert not other.done()
        pieces += [piece.text for piece in b.submit(list, answer).result(60)]
        assert other.result(60).text == "xyz"
    assert "".join(pieces) == "abcd"


def test_cancel_ends_the_running_answer_and_no_waiting_one() -> None:
    vlm = fakes.vlm(["abcdef", "xyz"])
    answer = vlm.stream("x")
    next(answer)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(vlm.ask, "y")
        while len(vlm._turns._waiting) < 1:
            pass
        vlm.cancel()
        assert (list(answer), answer.reply.finish_reason) == ([], "cancelled")
        assert other.result(60).finish_reason == "stop"


def embedded_afresh(vlm: VLM) -> npt.NDArray[np.float32]:
    vlm.engines.cache.clear()
    return vlm.image_embeddings(PICTURE)


@pytest.mark.parametrize("name", ["score", "image_embeddings"])
def test_cancel_is_for_answers_alone(name: str) -> None:
    with edgevlm.load() as vlm:
        calls = {
            "score": lambda: vlm.score("caption en", ["a red circle"] * 20, PICTURE).tolist(),
            "image_embeddings": lambda: embedded_afresh(vlm).tolist(),
        }
        right = calls[name]()
        with ThreadPoolExecutor(2) as pool:
            job, asked = pool.submit(calls[name]), pool.submit(vlm.ask, "caption en", PICTURE)
            while not job.done():
                vlm.cancel()
            assert job.result() == right
            assert asked.result(60).finish_reason in ("stop", "cancelled")


def test_the_end_of_a_chat_cancels_its_own_answer_alone() -> None:
    vlm = fakes.vlm(["abcdef", "xyz"])
    with vlm.chat() as chat:
        chat.ask("x")
        answer = vlm.stream("y")
        next(answer)
    assert answer.finish().text == "xyz"


@pytest.mark.parametrize("name", ["ask", "chat", "score", "image_embeddings"])
def test_close_ends_what_other_threads_are_doing(name: str) -> None:
    use, vlm = USES[name], edgevlm.load()
    chat, begun = vlm.chat(PICTURE), threading.Event()

    def work() -> None:
        while True:
            use(vlm, chat)
            begun.set()

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work) for _ in range(2)]
        assert begun.wait(60)
        vlm.close()
        for job in jobs:
            assert isinstance(job.exception(60), ModelClosed)


@pytest.mark.fault(
    "Python",
    "a signal handler that closes the model, or asks it",
    "closes it; asking is an error, no deadlock",
)
def test_a_signal_handler_may_close_the_model_and_not_ask_it() -> None:
    out = run(
        """
        import os, signal, edgevlm
        picture = os.environ["PICTURE"]
        vlm = edgevlm.load()
        def handle(*_):
            try:
                vlm.ask("caption en", picture)
            except edgevlm.EdgeVLMError as error:
                print(type(error).__name__)
            vlm.close()
        signal.signal(signal.SIGUSR1, handle)
        step = vlm.engines.decoder.step
        def signalled(token):
            os.kill(os.getpid(), signal.SIGUSR1)
            step(token)
        vlm.engines.decoder.step = signalled
        try:
            vlm.ask("caption en", picture)
        except edgevlm.EdgeVLMError as error:
            print(type(error).__name__)
        """
    )
    assert out.split() == ["PromptError", "ModelClosed"]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")


@needs_fork
@pytest.mark.parametrize("kept", [False, True], ids=["closed before", "still open"])
def test_a_forked_process_loads_a_model_of_its_own(kept: bool) -> None:
    out = run(
        f"""
        import multiprocessing, os, edgevlm
        def ask(_):
            with edgevlm.load() as vlm:
                return str(vlm.ask("caption en", os.environ["PICTURE"]))
        kept = edgevlm.load() if {kept} else None
        print(kept.ask("caption en", os.environ["PICTURE"]) if kept else ask(0))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(*pool.map(ask, [1, 2]), sep="\\n")
        """
    )
    assert out.splitlines() == [CAPTION] * 3


@pytest.mark.fault("Python", "a model used after fork()", "an error that says so, no hang")
@needs_fork
def test_a_forked_process_is_told_that_the_model_is_its_parents() -> None:
    """And ends as it would without one: nothing waits for threads that stayed with the parent."""
    out = run(
        """
        import os, sys, edgevlm
        picture = os.environ["PICTURE"]
        vlm = edgevlm.load()
        chat = vlm.chat(picture)
        answer = chat.stream("caption en")
        next(answer)
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            print(answer.finish())
            sys.exit()
        uses = [lambda: next(answer), lambda: chat.ask("x"), lambda: vlm.image_embeddings(picture),
                vlm.forget]
        for use in uses:
            try:
                use()
            except edgevlm.EdgeVLMError as error:
                print(error)
        vlm.close()
        del vlm, chat, answer
        with edgevlm.load() as vlm:
            print(vlm.ask("caption en", picture))
        """,
        without=("CI", "ORT_DISABLE_TELEMETRY"),
    )
    told = "the model was loaded before this process was forked; load it again in this one"
    assert out.splitlines() == [told] * 4 + [CAPTION] * 2


def test_onnxruntime_sends_nothing_home() -> None:
    out = run(
        "import os, edgevlm, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])",
        without=("CI", "ORT_DISABLE_TELEMETRY"),
    )
    assert out.strip() == "1"


def test_what_is_wrong_with_a_closed_model_is_an_error_of_edgevlms() -> None:
    assert issubclass(ModelClosed, EdgeVLMError)
