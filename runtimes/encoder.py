"""The picture's half: pixels -> features -> rows for the decoder, on two graphs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from edgevlm.errors import EngineError
from edgevlm.runtimes.engines import Cancelled, Float
from edgevlm.runtimes.ort import Ort, first_line


class OrtEncoder:
    """VisionEncoder on two sessions of onnxruntime, from `Ort.session`.

    provider: what runs the graphs, in onnxruntime's words. single: whether the sessions take one
    picture at a time.
    """

    def __init__(
        self, ort: Ort, vision: Any, projector: Any, *, provider: str, single: bool
    ) -> None:
        self.provider = provider
        self._ort = ort
        self._vision, self._projector = vision, projector
        self._single = single
        self._lock = threading.Lock()
        self._run: Any = None

    def features(self, pixels: Float) -> Float:
        """See VisionEncoder."""
        return self._call(self._vision, "pixels", pixels)

    def project(self, features: Float) -> Float:
        """See VisionEncoder."""
        return self._call(self._projector, "features", features)

    def _call(self, session: Any, name: str, value: Float) -> Float:
        if self._single and len(value) > 1:
            return np.concatenate([self._call(session, name, v[None]) for v in value])
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

    def close(self) -> None:
        """See VisionEncoder."""
        del self._vision, self._projector
