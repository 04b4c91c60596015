"""`python -m edgevlm.runtimes.importance BUNDLE IN.npz OUT.npz`: which weights matter to a model.

The decoder reads the model's own prefixes, pictures and words as in every answer, and
answers a little; what flows into each of its matrices is summed up. For the exporter, as stages.py.

IN: `image0`, `image1`, ...: pictures uint8 [h, w, 3]; `prompts` (str), one for each of them;
`n_tokens` (int), the length of each answer.
OUT: name of a matrix -> mean square of each column of its input, float32 [columns].
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import EdgeVLMError, EngineError
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.loading import LoadOptions, load_bundle


def importance(folder: Path, source: Path, target: Path) -> None:
    """Asks the bundle what is in `source` and writes what its decoder's matrices were fed."""
    given = np.load(source)
    with load_bundle(folder, LoadOptions(device="cpu", repack=False)) as vlm:
        decoder = vlm.engines.decoder
        if not isinstance(decoder, LlamaDecoder):
            raise EngineError("only llama.cpp's decoder has an importance matrix")
        heard = decoder.listen()
        for i, prompt in enumerate(given["prompts"]):
            vlm.ask(str(prompt), given[f"image{i}"], max_tokens=int(given["n_tokens"]))
    arrays: Any = heard.mean_squares  # numpy's stub takes names for its own options
    np.savez(target, **arrays)


if __name__ == "__main__":
    try:
        importance(*map(Path, sys.argv[1:]))
    except EdgeVLMError as error:
        sys.exit(str(error))
