"""The region model on onnxruntime: rows of the decoder -> bins, places and sizes -> rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EngineError, ModelClosed
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.vision.ort import first_line


class OrtRegions:
    """RegionModel on two sessions of onnxruntime, by the names of their inputs."""

    def __init__(self, hidden: Any, places: Any) -> None:
        self._sessions = {"hidden": hidden, "places": places}

    def bins(self, hidden: Float) -> Float:
        """See RegionModel."""
        (bins,) = self._call("hidden", hidden[None])
        return np.asarray(bins, np.float32)

    def rows(self, x: float, width: float, height: float) -> Float:
        """See RegionModel."""
        (rows,) = self._call("places", np.array([[x, width, height]], np.float32))
        return np.asarray(rows, np.float32)

    def _call(self, name: str, value: npt.NDArray[np.float32]) -> Float:
        if not self._sessions:
            raise ModelClosed("the region model is closed; load the model again")
        try:
            (result,) = self._sessions[name].run(None, {name: value})
        except Exception as e:
            raise EngineError(f"onnxruntime failed on {name}: {first_line(e)}") from None
        assert isinstance(result, np.ndarray)
        return result

    def close(self) -> None:
        """See RegionModel."""
        self._sessions.clear()
