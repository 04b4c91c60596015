"""Answers awaited in an event loop."""

import asyncio
import gc
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import edgevlm
from edgevlm.errors import ImageError, ModelClosed, PromptError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM

T = TypeVar("T")
SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
CAPTION = "a red circle, a blue square, a yellow triangle and a green star"


def run(main: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; it has to end in time."""
    return asyncio.run(asyncio.wait_for(main, 60))


@pytest.fixture(scope="module")
def pico() -> Iterator[VLM]:
    with edgevlm.load() as vlm:
        yield vlm


class Gate:
    """A decoder's steps, held up from the `n`th on until `open` is called."""

    def __init__(self, vlm: VLM, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.reached, self._open, self.steps = threading.Event(), threading.Event(), 0
        step = vlm.engines.decoder.step

        def held(token: int) -> None:
            self.steps += 1
            if self.steps >= n:
                self.reached.set()
                assert self._open.wait(60)
            step(token)

        monkeypatch.setattr(vlm.engines.decoder, "step", held)

    def open(self) -> None:
        self._open.set()

    async def wait(self) -> None:
        await asyncio.to_thread(self.reached.wait, 60)


def test_ask_and_stream_say_what_they_say_without_async(pico: VLM) -> None:
    async def main() -> None:
        assert (await pico.aask("caption en", SHAPES)).text == CAPTION
        answer = pico.astream("caption en", SHAPES)
        pieces = [piece.text async for piece in answer]
        assert len(pieces) > 5 and "".join(pieces) == answer.reply.text == CAPTION
        chat = pico.chat(SHAPES)
        assert (await chat.aask("answer en what shape is red?")).text == "circle"
        texts = [p.text async for p in chat.astream("answer en what shape is blue?")]
        assert "".join(texts) == chat.reply.text == "square" and len(chat.turns) == 2

    run(main())


def test_several_at_once_take_turns(pico: VLM) -> None:
    async def main() -> None:
        question = "answer en what shape is red?"
        answers = [pico.aask(question, SHAPES) for _ in range(24)]
        assert {reply.text for reply in await asyncio.gather(*answers)} == {"circle"}

    run(main())


def test_the_event_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vlm = fakes.vlm("abc")
        gate = Gate(vlm, monkeypatch, 1)
        asked = asyncio.create_task(vlm.aask("x"))
        await gate.wait()
        assert not asked.done()  # and yet this line is reached
        gate.open()
        assert (await asked).text == "abc"

    run(main())


def test_errors_come_where_the_answer_is_awaited(tmp_path: Path) -> None:
    async def main() -> None:
        vlm = fakes.vlm()
        answer = vlm.astream("x", tmp_path / "none.png")
        with pytest.raises(PromptError, match="has not begun"):
            _ = answer.reply
        with pytest.raises(ImageError, match="none.png"):
            await anext(answer)
        assert [piece async for piece in answer] == []
        with pytest.raises(PromptError, match="max_tokens must be at least 1"):
            await vlm.aask("x", max_tokens=0)
        vlm.close()
        with pytest.raises(ModelClosed):
            await vlm.aask("x")

    run(main())


def test_a_task_that_is_cancelled_ends_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vlm = fakes.vlm("x" * 200)
        gate = Gate(vlm, monkeypatch, 3)
        task = asyncio.create_task(vlm.aask("x"))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        # The next answer gets its turn although the first had much to say.
        assert len((await vlm.aask("x", max_tokens=2)).token_ids) == 2
        assert gate.steps < 10

    run(main())


def test_a_timeout_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vlm = fakes.vlm("x" * 200)
        gate = Gate(vlm, monkeypatch, 3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vlm.aask("x"), 0.01)
        gate.open()
        assert len((await vlm.aask("x", max_tokens=2)).token_ids) == 2
        assert gate.steps < 10

    run(main())


def test_who_leaves_a_block_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vlm = fakes.vlm("x" * 200)
        gate = Gate(vlm, monkeypatch, 5)
        async with vlm.astream("x") as answer:
            async for _ in answer:
                break
            await gate.wait()
            # The loop comes to this once the end of the block waits, having cancelled.
            asyncio.get_running_loop().call_soon(gate.open)
        assert answer.reply.finish_reason == "cancelled" and gate.steps < 10
        await answer.aclose()  # once more
        assert [piece async for piece in answer] == []

    run(main())


def test_an_answer_is_cancelled_while_it_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        vlm = fakes.vlm("abc")
        gate = Gate(vlm, monkeypatch, 1)
        first = asyncio.create_task(vlm.aask("x"))
        await gate.wait()
        second = vlm.astream("y")
        waiting = asyncio.create_task(second.finish())
        while second._drawing is None or second._drawing.answer is None:
            await asyncio.sleep(0)
        second.cancel()
        assert (await waiting).finish_reason == "cancelled"  # before the first has ended
        assert not first.done()
        gate.open()
        assert (await first).text == "abc"

    run(main())


def test_an_answer_that_nobody_keeps_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vlm = fakes.vlm("x" * 200)
        gate = Gate(vlm, monkeypatch, 3)
        answer = vlm.astream("x")
        await anext(answer)
        await gate.wait()
        del answer
        gc.collect()
        gate.open()
        assert len((await vlm.aask("x", max_tokens=2)).token_ids) == 2
        assert gate.steps < 10

    run(main())


def test_a_loop_that_ends_ends_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = fakes.vlm("x" * 200)
    gate = Gate(vlm, monkeypatch, 3)
    kept = []

    async def main() -> None:
        kept.append(vlm.astream("x"))
        await anext(kept[0])
        await gate.wait()

    run(main())
    gate.open()
    assert len(vlm.ask("x", max_tokens=2).token_ids) == 2
    assert gate.steps < 10 and kept[0].reply.finish_reason == "cancelled"
