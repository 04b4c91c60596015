"""The end of the command line on Ctrl-C, on SIGTERM and when the terminal is closed.

A KeyboardInterrupt is raised between any two bytecodes of the main thread, and much of what runs
there for an export cannot bear that: numpy drops it or makes a TypeError of it, ctypes prints and
forgets it, an import that it hits leaves half a package behind, and native code lets it wait for
minutes. So the work is done in another thread (`Aside`), where no signal is delivered. The main
thread waits; its handler removes what must not stay (`edgevlm.cleanup`) and ends the process
without a word to the code that was at work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from edgevlm import cleanup

T = TypeVar("T")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# Windows lets no signal end a wait; elsewhere it is as good as endless.
_PATIENCE_S = 0.1
_SHOW_CURSOR = b"\x1b[?25h\n"
_last_words: list[Callable[[], str]] = []


class Aside(click.Command):
    """A command that is run beside the main thread, which waits for its end or a signal."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Command."""
        return beside(lambda: super(Aside, self).invoke(ctx))


def beside(call: Callable[[], T]) -> T:
    """Runs a call beside the main thread, which waits for its end or a signal."""
    future = Future[T]()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    thread = threading.Thread(target=work, name="command", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_PATIENCE_S)
    return future.result()


@contextmanager
def handling() -> Iterator[None]:
    """Signals end the process, cleanly, within the block.

    Those that somebody ignores (nohup, a shell for its background jobs) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {s: signal.signal(s, _end) for s in _SIGNALS if signal.getsignal(s) in default}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt within the block, for a command that goes on after it, and
    other signals SystemExit; also where native code made another exception of it.
    """
    caught: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        caught.append(number)
        raise _exception(number)

    changed = [s for s in _SIGNALS if signal.getsignal(s) is _end]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if caught:
            raise _exception(caught[0]) from None
        raise
    finally:
        for number in changed:
            signal.signal(number, _end)


@contextmanager
def last_words(say: Callable[[], str]) -> Iterator[None]:
    """A line on stderr where a signal ends the process within the block, such as how to go on.
    It is asked for by the handler, whatever else is at work.
    """
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def ignore() -> None:
    """Ignores signals from now on: the work is done, and only Python's own end is left, which an
    interrupt would turn into a traceback.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, _: FrameType | None) -> NoReturn:
    ignore()
    try:
        cleanup.everything()
        # A progress bar hides the cursor.
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            for say in _last_words:
                os.write(2, f"{say()}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(128 + number)
