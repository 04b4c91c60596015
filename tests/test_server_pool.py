"""The pool: what is loaded, what goes, who waits."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from edgevlm.errors import BundleCorrupt
from edgevlm.manifest import read_manifest
from edgevlm.models import built_in
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.server.pool import Pool, needed_bytes
from edgevlm.server.problems import Problem
from tests.serving import pool_of

ONE = needed_bytes(read_manifest(built_in()))


class Models:
    """Fakes that say when they are loaded and closed."""

    def __init__(self, *names: str) -> None:
        self.loads: Counter[str] = Counter()
        self.closes: Counter[str] = Counter()
        self.by_name = {name: self._maker(name) for name in names}

    def _maker(self, name: str) -> Callable[[], VLM]:
        def make() -> VLM:
            self.loads[name] += 1
            vlm = fakes.vlm(name)
            close = vlm.close

            def closed() -> None:
                self.closes[name] += 1
                close()

            vlm.close = closed  # type: ignore[method-assign]
            return vlm

        return make


def run(work: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def ask(pool: Pool, name: str) -> str:
    async with pool.lease(name) as model:
        return model.vlm.ask("x").text


def test_models_are_loaded_once_when_they_are_asked() -> None:
    models = Models("a", "b")
    pool = pool_of(models.by_name)

    async def work() -> None:
        assert not models.loads
        assert await asyncio.gather(*[ask(pool, "a") for _ in range(5)]) == ["a"] * 5
        assert models.loads == {"a": 1} and pool.loaded == ["a"]
        assert await ask(pool, "b") == "b"
        await pool.close()
        assert models.closes == {"a": 1, "b": 1} and pool.loaded == []

    run(work)


def test_the_least_recently_used_goes_first() -> None:
    models = Models("a", "b", "c")
    pool = pool_of(models.by_name, budget=2 * ONE)

    async def work() -> None:
        for name in ("a", "b", "a", "c"):
            assert await ask(pool, name) == name
        assert models.closes == {"b": 1} and sorted(pool.loaded) == ["a", "c"]
        assert await ask(pool, "b") == "b"
        assert models.closes == {"b": 1, "a": 1}
        await pool.close()

    run(work)


def test_a_model_in_use_never_goes_and_those_after_wait_in_turn() -> None:
    models = Models("a", "b")
    pool = pool_of(models.by_name, budget=ONE)
    order: list[str] = []

    async def noted(name: str) -> None:
        order.append(await ask(pool, name))

    async def work() -> None:
        async with pool.lease("a") as model:
            later = [asyncio.create_task(noted(name)) for name in ("b", "a")]
            await asyncio.sleep(0)
            assert model.vlm.ask("x").text == "a"
            assert not models.closes and not order and models.loads == {"a": 1}
        await asyncio.gather(*later)
        # What came after the one that had to wait did not go before it.
        assert order == ["b", "a"] and models.loads == {"a": 2, "b": 1}
        await pool.close()

    run(work)


def test_who_stops_waiting_for_room_lets_the_others_through() -> None:
    models = Models("a", "b")
    pool = pool_of(models.by_name, budget=ONE)

    async def work() -> None:
        async with pool.lease("a"):
            impatient = asyncio.create_task(ask(pool, "b"))
            patient = asyncio.create_task(ask(pool, "a"))
            await asyncio.sleep(0)
            impatient.cancel()
            assert await patient == "a"
        assert models.loads == {"a": 1}
        await pool.close()

    run(work)


def test_idle_models_go() -> None:
    models = Models("a", "b")
    pool = pool_of(models.by_name, idle_s=0.0)

    async def work() -> None:
        async with pool.lease("a"):
            assert await ask(pool, "b") == "b"
            while not models.closes:
                await asyncio.sleep(0)
            assert models.closes == {"b": 1} and pool.loaded == ["a"]
        while models.closes != {"a": 1, "b": 1}:
            await asyncio.sleep(0)
        assert await ask(pool, "a") == "a"
        await pool.close()

    run(work)


def test_a_load_goes_on_when_who_asked_first_has_gone() -> None:
    may_load, loading = threading.Event(), threading.Event()

    def slow() -> VLM:
        loading.set()
        may_load.wait()
        return fakes.vlm("a")

    pool = pool_of({"a": slow})

    async def work() -> None:
        first, second = (asyncio.create_task(ask(pool, "a")) for _ in range(2))
        await asyncio.to_thread(loading.wait)
        assert pool.loaded == []
        first.cancel()
        await asyncio.wait([first])
        may_load.set()
        assert await second == "a" and pool.loaded == ["a"]
        await pool.close()

    run(work)


@pytest.mark.fault(
    "Server",
    "a model that cannot be loaded",
    "an error for who asked; the next request tries again",
)
def test_a_model_that_cannot_be_loaded_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    problems: list[Exception] = [BundleCorrupt(Path("secret/edgevlm.json"), "is truncated")]

    def load() -> VLM:
        if problems:
            raise problems.pop()
        return fakes.vlm("a")

    pool = pool_of({"a": load})

    async def work() -> None:
        with caplog.at_level(logging.ERROR), pytest.raises(Problem, match="log says why") as caught:
            await ask(pool, "a")
        assert caught.value.status == 503 and "secret" not in caught.value.message
        assert "secret/edgevlm.json: is truncated" in caplog.text
        assert await ask(pool, "a") == "a"
        await pool.close()

    run(work)


@pytest.mark.fault("Server", "a model larger than the server's memory budget", "refused in numbers")
def test_a_model_that_is_larger_than_the_budget_is_refused() -> None:
    pool = pool_of({"a": fakes.vlm}, budget=ONE - 1)

    async def work() -> None:
        with pytest.raises(
            Problem, match="needs about 0.0\\d+ GB .* --memory raises that"
        ) as caught:
            await ask(pool, "a")
        assert caught.value.status == 503
        with pytest.raises(Problem, match="does not exist here"):
            await ask(pool, "b")

    run(work)


def test_a_model_that_was_loaded_before_is_used() -> None:
    models = Models("a")
    pool = pool_of(models.by_name)
    pool.add("a", fakes.vlm("before"))

    async def work() -> None:
        pool.begin()
        assert await ask(pool, "a") == "before" and not models.loads
        await pool.close()

    run(work)


def test_a_model_that_was_loaded_before_and_is_never_asked_goes() -> None:
    pool = pool_of({"a": fakes.vlm}, idle_s=0.0)
    pool.add("a", fakes.vlm("before"))

    async def work() -> None:
        pool.begin()
        while pool.loaded:
            await asyncio.sleep(0)
        await pool.close()

    run(work)
