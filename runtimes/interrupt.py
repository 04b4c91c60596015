"""Long native calls that Ctrl-C and another thread can end.

Python runs a signal's handler only between two bytecodes of the main thread. While the main thread
sits in a native call of seconds (a vision tower, a prefill) a Ctrl-C would wait for its end, so
such calls run in a helper thread and the caller waits for it in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_S = 0.05
_jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()


def interruptible(call: Callable[[], T], stop: Callable[[], None]) -> T:
    """Runs `call`; on an exception in the waiting thread (KeyboardInterrupt) asks it to `stop`,
    waits for it to end, and raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    # Made here, so that a Ctrl-C at any line below knows what is running.
    future: Future[T] = Future()
    try:
        if not _worker.is_alive():
            _worker.start()
        _jobs.put((future, call))
        return future.result()
    except BaseException:
        # Again and again: a call that is only about to begin forgets that it was asked.
        while not future.cancel() and not future.done():
            stop()
            wait([future], timeout=_PATIENCE_S)
        raise


def _work() -> None:
    while True:
        future, call = _jobs.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as e:
                future.set_exception(e)
        del future, call  # nothing is kept alive until the next job


# One thread for the life of the process: OpenMP keeps a team of workers for each calling thread. An
# executor's would not do: a Ctrl-C while it starts leaves one that the process waits for at its
# end.
_worker = threading.Thread(target=_work, name="edgevlm", daemon=True)
