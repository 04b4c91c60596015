"""`python -m edgevlm.runtimes.probe BUNDLE IN.npz OUT.npz`: every stage of one greedy answer.

For the exporter, which compares the stages with the source in another process: the two halves of
edgevlm meet only in files, and the thread pools of two engines do not share a process.

IN: image uint8 [h, w, 3], prompt (str), n_tokens (int); tokens int32 [n_tokens] to read instead of
its own, where they are there.
OUT: pixels float32 [1, 3, size, size], features [1, patches, width], embeddings
[1, tokens, n_embd], prompt_ids int32 [n], logits float32 [1 + n_tokens, n_vocab] (after the prefix,
then after each token), tokens int32 [n_tokens] (the arg max each time, end tokens included).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from edgevlm.errors import EdgeVLMError
from edgevlm.image import preprocess
from edgevlm.runtimes.loading import Settings, load_bundle
from edgevlm.runtimes.request import prefill, prepare
from edgevlm.sampling import Sampling


def probe(folder: Path, source: Path, target: Path) -> None:
    """Runs the stages on the picture and prompt in `source` and writes them to `target`."""
    given = np.load(source)
    n_tokens = int(given["n_tokens"])
    with load_bundle(folder, Settings()) as vlm:
        model = vlm.parts
        request = prepare(
            model, str(given["prompt"]), [given["image"]], Sampling(max_tokens=n_tokens)
        )
        pixels = preprocess(request.pictures[0].rgb, model.manifest.image)[None]
        features = model.encoder.features(pixels)
        embeddings = model.encoder.project(features)
        blocks = [
            embeddings[0] if isinstance(p, int) else model.decoder.embed(p) for p in request.parts
        ]
        prefill(model, request, np.concatenate(blocks), n_tokens)
        logits, tokens = [model.decoder.logits()], []
        for i in range(n_tokens):
            tokens.append(int(given["tokens"][i] if "tokens" in given else logits[-1].argmax()))
            model.decoder.step(tokens[-1])
            logits.append(model.decoder.logits())
    np.savez(
        target,
        pixels=pixels,
        features=features,
        embeddings=embeddings,
        prompt_ids=np.array([t for p in request.parts if isinstance(p, list) for t in p], np.int32),
        logits=np.stack(logits),
        tokens=np.array(tokens, np.int32),
    )


if __name__ == "__main__":
    try:
        probe(*map(Path, sys.argv[1:]))
    except EdgeVLMError as error:
        sys.exit(str(error))
