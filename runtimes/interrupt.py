"""Long native calls that Ctrl-C and another thread can end.

Python runs a signal's handler only between two bytecodes of the main thread. While the main thread
sits in a native call of seconds (a vision tower, a prefill) a Ctrl-C would wait for its end, so
such calls run in a helper thread and the caller waits for it in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# One thread for the life of the process: OpenMP keeps a team of workers for each calling thread.
_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgevlm")


def interruptible(call: Callable[[], T], stop: Callable[[], None]) -> T:
    """Runs `call`; on an exception in the waiting thread (KeyboardInterrupt) asks it to `stop`,
    waits for it to end, and raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    future = _pool.submit(call)
    try:
        return future.result()
    except BaseException:
        if not future.done():
            stop()
            future.exception()
        raise
