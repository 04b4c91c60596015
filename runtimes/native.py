"""Native objects that outlive no Python object, and that no Python object outlives."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from edgevlm.errors import ModelClosed


class Handle:
    """A native object and the call that frees it, made once: by `close`, with the last reference to
    this handle, or at the end of the process. `needs` are the handles of what it is built on, which
    stay as long as it does. `what` names it in the error of a use that comes too late.
    """

    def __init__(
        self, what: str, pointer: Any, free: Callable[[Any], object], *needs: Handle
    ) -> None:
        self._what = what
        self._pointer = pointer
        self._finalizer = weakref.finalize(self, _free, os.getpid(), free, pointer, needs)

    @property
    def pointer(self) -> Any:
        """The native library's own handle; raises ModelClosed once it is freed."""
        if not self._finalizer.alive:
            raise ModelClosed(f"{self._what} is closed; load the model again")
        return self._pointer

    def close(self) -> None:
        """Frees it now; a second call does nothing."""
        self._finalizer()


def _free(process: int, free: Callable[[Any], object], pointer: Any, _: tuple[Handle, ...]) -> None:
    # A forked process has a copy of the memory, and none of the threads that the library may wait
    # for: there it is left to the end of the process.
    if os.getpid() == process:
        free(pointer)
