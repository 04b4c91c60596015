"""The mask decoder on onnxruntime: codes of a mask -> the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EngineError, ModelClosed
from edgevlm.masks import one_hot
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.vision.ort import first_line


class OrtMasks:
    """MaskDecoder on a session of onnxruntime."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def decode(self, codes: npt.NDArray[np.int64]) -> Float:
        """See MaskDecoder."""
        if self._session is None:
            raise ModelClosed("the mask decoder is closed; load the model again")
        try:
            (masks,) = self._session.run(None, {"codes": one_hot(codes)})
        except Exception as e:
            raise EngineError(f"onnxruntime failed on the masks: {first_line(e)}") from None
        assert isinstance(masks, np.ndarray)
        return masks[:, 0]

    def close(self) -> None:
        """See MaskDecoder."""
        self._session = None
