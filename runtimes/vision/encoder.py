"""The vision encoder and projector: pixels -> features -> image embeddings, on two graphs; and a
tower of a dual encoder: pixels or token ids -> rows, on one.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EngineError, ModelClosed
from edgevlm.runtimes.engines import Cancelled, Float
from edgevlm.runtimes.vision.ort import Ort, first_line


class OrtEncoder:
    """VisionEncoder on two sessions of onnxruntime, from `Ort.session`, or RowEncoder on one.

    sessions: by the name of their input. provider: what runs the graphs, in onnxruntime's words.
    single: whether the sessions take one picture at a time. again: makes the sessions anew, after a
    release.
    """

    def __init__(
        self,
        ort: Ort,
        sessions: Mapping[str, Any],
        *,
        provider: str,
        single: bool,
        again: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.provider = provider
        self._ort = ort
        self._sessions = dict(sessions)
        self._first = next(iter(sessions))
        self._single, self._again = single, again
        self._released = False
        self._lock = threading.Lock()
        self._run: Any = None
        _open.add(self)

    def features(self, pixels: Float) -> Float:
        """See VisionEncoder."""
        return self._call("pixels", pixels)

    def project(self, features: Float) -> Float:
        """See VisionEncoder."""
        return self._call("features", features)

    def embed(self, batch: npt.NDArray[np.generic]) -> Float:
        """See RowEncoder."""
        return self._call(self._first, batch)

    def _call(self, name: str, value: npt.NDArray[np.generic]) -> Float:
        """Runs the graph whose input goes by this name."""
        if self._single and len(value) > 1:
            return np.concatenate([self._call(name, v[None]) for v in value])
        if self._released:
            self._released = False
            self._sessions.update(self._again())
        session = self._sessions.get(name)
        if session is None:
            raise ModelClosed("the encoder is closed; load the model again")
        run = self._ort.run_options()
        with self._lock:
            self._run = run
        try:
            (result,) = session.run(None, {name: value}, run)
        except Exception as e:
            if run.terminate:
                raise Cancelled from None
            raise EngineError(f"onnxruntime failed on {name}: {first_line(e)}") from None
        finally:
            with self._lock:
                self._run = None
        assert isinstance(result, np.ndarray)
        return result

    def cancel(self) -> None:
        """See VisionEncoder."""
        with self._lock:
            if self._run is not None:
                self._run.terminate = True

    def release(self) -> None:
        """See VisionEncoder."""
        if self._sessions:
            self._sessions.clear()
            self._released = True

    def close(self) -> None:
        """See VisionEncoder."""
        self._released = False
        self._sessions.clear()


_open: weakref.WeakSet[OrtEncoder] = weakref.WeakSet()


def _leave_behind() -> None:
    """Keeps the sessions of a forked process to its end: one that goes waits for its threads, which
    stayed with the parent.
    """
    for encoder in _open:
        for session in encoder._sessions.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_behind)
