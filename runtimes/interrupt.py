"""Long native calls that Ctrl-C and another thread can end.

Python runs a signal's handler only between two bytecodes of the main thread. While the main thread
sits in a native call of seconds (a vision tower, a prefill) a Ctrl-C would wait for its end, so
such calls run in a helper thread and the caller waits for it in Python.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_PATIENCE_S = 0.05


class _Worker:
    """One thread for the life of the process, whoever calls: OpenMP keeps a team of workers for
    each calling thread, and with more of them than cores it stops spinning at its barriers. That
    made decode 1.4 times slower in MobilePALO, 10 times in pico. An executor's thread would not do:
    a Ctrl-C while it starts leaves one that the process waits for at its end.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="edgevlm", daemon=True)

    def calls_itself(self) -> bool:
        """True where the caller is this thread."""
        return threading.current_thread() is self._thread

    def submit(self, future: Future[T], call: Callable[[], T]) -> None:
        """Runs the call after those that came before it."""
        with self._starting:
            if not self._thread.is_alive():
                self._thread.start()
        self._jobs.put((future, call))

    def _work(self) -> None:
        while True:
            future, call = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as e:
                    future.set_exception(e)
            del future, call  # nothing is kept alive until the next job


def interruptible(call: Callable[[], T], stop: Callable[[], None]) -> T:
    """Runs `call`; on an exception in the waiting thread (KeyboardInterrupt) asks it to `stop`,
    waits for it to end, and raises.
    """
    worker = _worker
    if worker.calls_itself():
        return call()
    # Made here, so that a Ctrl-C at any line below knows what is running.
    future: Future[T] = Future()
    try:
        worker.submit(future, call)
        return future.result()
    except BaseException:
        # Again and again: a call that is only about to begin forgets that it was asked.
        while not future.cancel() and not future.done():
            stop()
            wait([future], timeout=_PATIENCE_S)
        raise


class SideThread(Generic[T]):
    """A call in a thread of its own while the block runs; `result` waits for it.

    It is for what computes with no team of OpenMP's. At the end of the block the call, where it
    still runs, is asked to `stop` until it has ended.
    """

    def __init__(self, call: Callable[[], T], stop: Callable[[], None]) -> None:
        self._call, self._stop = call, stop
        self._future: Future[T] = Future()

    def _work(self) -> None:
        try:
            self._future.set_result(self._call())
        except BaseException as e:
            self._future.set_exception(e)

    def result(self) -> T:
        """The call's result, or its exception."""
        return self._future.result()

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, name="edgevlm-beside", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        while not self._future.done():
            self._stop()
            wait([self._future], timeout=_PATIENCE_S)


_worker = _Worker()


def _renew() -> None:
    """Replaces the worker in a forked process, whose threads stayed behind."""
    global _worker
    _worker = _Worker()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
