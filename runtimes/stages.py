"""Every stage of one answer; as `python -m edgevlm.runtimes.stages BUNDLE IN.npz OUT.npz`, in a
process of its own.

So the exporter compares the stages with the source: the two sides of edgevlm meet only in files,
and the thread pools of two engines do not share a process.

IN: image uint8 [h, w, 3], prompt (str), n_tokens (int); tokens int32 [n_tokens] to read instead of
its own, where they are there. OUT: the fields of Stages.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.errors import EdgeVLMError
from edgevlm.image import ImageSource, cut
from edgevlm.image.overlap import for_projector
from edgevlm.prompt import Exchange, Tokens
from edgevlm.runtimes.engines import Float
from edgevlm.runtimes.joining import join
from edgevlm.runtimes.loading import LoadOptions, load_bundle
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.request import joined, prefill, prepare
from edgevlm.sampling import Sampling


@dataclass(frozen=True)
class Stages:
    """Every stage of an answer about one picture.

    pixels: float32 [tiles, 3, size, size]. features: float32 [tiles, patches, width]. embeddings:
    float32 [tiles, tokens, n_embd], of tiles that overlap [1, tokens, n_embd]. prompt_ids: int32
    [n]. logits: float32 [1 + n, n_vocab], after the prefix and after each token. tokens: int32 [n],
    the likeliest ones or those that were given.
    """

    pixels: Float
    features: Float
    embeddings: Float
    prompt_ids: npt.NDArray[np.int32]
    logits: Float
    tokens: npt.NDArray[np.int32]


def stages(
    model: Engines,
    prompt: str,
    image: ImageSource,
    n_tokens: int,
    *,
    follow: Sequence[int] | None = None,
    stop: Collection[int] = (),
) -> Stages:
    """Computes everything anew, greedily.

    At most `n_tokens` tokens are read: those of `follow`, or the model's own up to one of `stop`.
    """
    options = Sampling(max_tokens=n_tokens)
    request = prepare(model, [Exchange(prompt, 1)], [image], options)
    (picture,), (spec,) = request.pictures, request.specs
    pixels = cut(picture.picture, spec)
    features = model.encoder.features(pixels)
    embeddings = model.encoder.project(for_projector(features, picture.size, spec))
    rows = join(embeddings, picture.plan(spec), model.newline)
    prefill(model, request, joined(model, request, [rows]), n_tokens)
    logits, tokens = [model.decoder.logits()], list[int]()
    while len(tokens) < (n_tokens if follow is None else len(follow)):
        token = int(logits[-1].argmax()) if follow is None else int(follow[len(tokens)])
        if token in stop and follow is None:
            break
        model.decoder.step(token)
        tokens.append(token)
        logits.append(model.decoder.logits())
    ids = [i for s in request.segments if isinstance(s, Tokens) for i in s.ids]
    return Stages(
        pixels,
        features,
        embeddings,
        np.array(ids, np.int32),
        np.stack(logits),
        np.array(tokens, np.int32),
    )


def main(folder: Path, source: Path, target: Path) -> None:
    """Runs the stages on the picture and prompt in `source` and writes them to `target`."""
    given = np.load(source)
    with load_bundle(folder, LoadOptions()) as vlm:
        made = stages(
            vlm.engines,
            str(given["prompt"]),
            given["image"],
            int(given["n_tokens"]),
            follow=given.get("tokens"),
        )
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    np.savez(target, **fields)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except EdgeVLMError as error:
        sys.exit(str(error))
