"""The picture's half: pixels -> features -> rows for the decoder. The only user of onnxruntime."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgevlm.errors import BundleCorrupt, EngineError, EngineMissing
from edgevlm.runtimes.engines import Cancelled, Float

DEVICES = ("auto", "cpu")


class OrtEncoder:
    """VisionEncoder on two ONNX graphs in onnxruntime's CPU provider.

    Raises BundleCorrupt if onnxruntime cannot read a graph, EngineMissing for an unknown device.
    """

    def __init__(
        self, vision: Path, projector: Path, *, threads: int, device: str = "auto"
    ) -> None:
        if device not in DEVICES:
            raise EngineMissing(
                f"device {device!r} cannot run the vision encoder", f"choose {' or '.join(DEVICES)}"
            )
        self._vision = _session(vision, threads)
        self._projector = _session(projector, threads)
        self._lock = threading.Lock()
        self._run: ort.RunOptions | None = None

    @property
    def provider(self) -> str:
        """The execution provider that runs the graphs, in onnxruntime's words."""
        return str(self._vision.get_providers()[0])

    def features(self, pixels: Float) -> Float:
        """See VisionEncoder."""
        return self._call(self._vision, "pixels", pixels)

    def project(self, features: Float) -> Float:
        """See VisionEncoder."""
        return self._call(self._projector, "features", features)

    def _call(self, session: ort.InferenceSession, name: str, value: Float) -> Float:
        run = ort.RunOptions()
        # A fatal message of a cancelled run would go to stderr.
        run.log_severity_level = 4
        with self._lock:
            self._run = run
        try:
            (result,) = session.run(None, {name: value}, run)
        except Exception as e:
            if run.terminate:
                raise Cancelled from None
            raise EngineError(f"onnxruntime failed on {name}: {_first_line(e)}") from None
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


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Workers that spin after a run take the decoder's cores (measured: up to 4x slower).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BundleCorrupt(path, f"onnxruntime cannot load it ({_first_line(e)})") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
