"""Distance of a bundle's answers from a reference's: two precisions of one model, side by side.

Both see the same drawn scenes and are asked the same; the candidate then reads the reference's
greedy answers, so that every next-token distribution is compared after the same words. Each engine
has a process of its own (`python -m edgevlm.benchmarks.quality` is the child): thread pools in one
process would fight.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm.benchmarks.scenes.evaluate import GENERATORS, TASKS, evaluate, held_out, questions_of
from edgevlm.benchmarks.scenes.textured_scenes import Scene
from edgevlm.bundle import open_bundle
from edgevlm.errors import BenchError, EdgeVLMError
from edgevlm.export import child
from edgevlm.export.parity.metrics import divergence, shared
from edgevlm.manifest import Manifest
from edgevlm.models import BUILT_IN
from edgevlm.prompt import task_prompt

if TYPE_CHECKING:
    from edgevlm.runtimes.loading import LoadOptions
    from edgevlm.runtimes.session import VLM

# Scenes whose answers are followed token by token, and tokens of each answer at most: a row of
# logits of a large vocabulary is a megabyte.
_FOLLOWED = 32
_TOKENS = 8
_QUESTION = "What is in the picture?"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class MeasuredQuality:
    """A candidate against its reference.

    features_cosine, embeddings_cosine: mean cosine of the encoder's and the projector's rows.
    logit_kl: mean of KL(reference || candidate) over the next-token distributions, in nats;
    over the tokens that both can write, where one was trimmed to languages.
    top1_agreement: share of those at which both name the same token.
    positions: how many distributions were compared.
    accuracy: right answers by task, 0..1, over `scenes` scenes of each drawing routine; of pico
    alone, which knows these scenes. "all" is the share over every question.
    """

    features_cosine: float
    embeddings_cosine: float
    logit_kl: float
    top1_agreement: float
    positions: int
    accuracy: Mapping[str, float]


def measure(
    candidate: Path, reference: Path, scenes: int = 100, *, threads: int | None = None
) -> MeasuredQuality:
    """Compares two bundles of one model over drawn scenes; raises BenchError.

    The time goes into the scenes: eight questions each for pico, one answer for other models.
    """
    ours_is, theirs_is = (_untrimmed(folder) for folder in (candidate, reference))
    for part in ("family", "image", "prompt", "decoder"):
        if getattr(ours_is, part) != getattr(theirs_is, part):
            raise BenchError(
                f"{candidate} and {reference} are two models (their {part} differs); "
                "compare two precisions of one"
            )
    with tempfile.TemporaryDirectory() as scratch:
        theirs = observe(reference, Path(scratch) / "reference.npz", scenes, threads=threads)
        ours = observe(
            candidate, Path(scratch) / "candidate.npz", scenes, follow=theirs, threads=threads
        )
        return compare(ours, theirs)


def _untrimmed(folder: Path) -> Manifest:
    """A bundle's manifest, of a trimmed one as it was before: it is the same model."""
    manifest = open_bundle(folder).manifest
    decoder = replace(manifest.decoder, n_output=0, languages=())
    return replace(manifest, decoder=decoder)


def observe(
    bundle: Path,
    target: Path,
    scenes: int,
    *,
    follow: Path | None = None,
    threads: int | None = None,
    kv: str | None = None,
) -> Path:
    """Writes what a bundle makes of the scenes to `target`, an npz file, and returns it.

    With `follow`, another bundle's file, the decoder reads that one's answers instead of its own;
    threads and kv are those of `edgevlm.load`.
    """
    more = [follow] if follow else []
    numbers = (str(scenes), str(threads or 0), kv or "")
    command = child.command("edgevlm.benchmarks.quality", bundle, target, *numbers, *more)
    done = child.run(command)
    if done.returncode or not target.exists():
        lines = done.stderr.strip().splitlines()
        raise BenchError(f"{bundle}: cannot be measured ({(lines or ['no reason'])[-1]})")
    return target


def compare(candidate: Path, reference: Path) -> MeasuredQuality:
    """The quality that two files of `observe` show."""
    with np.load(candidate) as ours, np.load(reference) as theirs:
        top = ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)
        return MeasuredQuality(
            features_cosine=_cosine(ours["features"], theirs["features"]),
            embeddings_cosine=_cosine(ours["embeddings"], theirs["embeddings"]),
            logit_kl=divergence(*shared(ours["logits"], theirs["logits"])),
            top1_agreement=float(top.mean()),
            positions=len(top),
            accuracy=dict(zip(ours["tasks"].tolist(), ours["shares"].tolist(), strict=True)),
        )


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(((x * y).sum(-1) / np.maximum(norms, 1e-30)).mean())


def _watch(bundle: Path, options: LoadOptions, scenes: int, follow: Path | None) -> dict[str, Any]:
    """Observations as `observe` writes them, with the engines in this process."""
    from edgevlm.runtimes.loading import load_bundle

    with load_bundle(bundle, options) as vlm:
        found = _follow(vlm, scenes, np.load(follow) if follow else None)
        tasks = _accuracy(vlm, scenes) if vlm.manifest.name == BUILT_IN else {}
    return found | {"tasks": np.array(list(tasks), str), "shares": np.array(list(tasks.values()))}


def _follow(vlm: VLM, scenes: int, other: Arrays | None) -> dict[str, NDArray[Any]]:
    """Every stage of an answer about each of the first scenes."""
    from edgevlm.runtimes.stages import stages

    features, embeddings, logits, answers = [], [], [], []
    stop = vlm.manifest.answer.stop_tokens
    for i, (scene, prompt) in enumerate(_requests(vlm.manifest, min(scenes, _FOLLOWED))):
        known = None if other is None else [int(t) for t in other["answers"][i] if t >= 0]
        picture = np.asarray(scene.picture)
        made = stages(vlm.engines, prompt, picture, _TOKENS, follow=known, stop=stop)
        features.append(made.features[0])
        embeddings.append(made.embeddings[0])
        logits += list(made.logits)
        answers.append([*made.tokens, *[-1] * (_TOKENS - len(made.tokens))])
        vlm.forget()
    return {
        "features": np.stack(features),
        "embeddings": np.stack(embeddings),
        "logits": np.stack(logits),
        "answers": np.array(answers),
    }


def _requests(manifest: Manifest, n: int) -> Iterator[tuple[Scene, str]]:
    """Scenes of all drawing routines in turn, each with a prompt of the model's."""
    drawn = {name: held_out(name, n) for name in GENERATORS}
    for i in range(n):
        scene, rng = next(drawn[list(GENERATORS)[i % len(GENERATORS)]])
        yield scene, _prompt(manifest, scene, rng)


def _prompt(manifest: Manifest, scene: Scene, rng: Random) -> str:
    if manifest.name == BUILT_IN:
        return rng.choice(list(questions_of(scene, rng))).prompt
    tasks = [task for task in ("caption", "answer", "ocr") if task in manifest.prompt.tasks]
    return task_prompt(manifest.prompt, rng.choice(tasks), _QUESTION) if tasks else _QUESTION


@dataclass(frozen=True)
class _Answerer:
    """Lets pico's questions be asked of a loaded model."""

    vlm: VLM

    def answers(self, picture: Image.Image, prompts: Sequence[str]) -> list[str]:
        return [self.vlm.ask(prompt, picture).text for prompt in prompts]


def _accuracy(vlm: VLM, scenes: int) -> dict[str, float]:
    scores = [evaluate(_Answerer(vlm), name, scenes).counts for name in GENERATORS]
    counts = {
        task: [sum(s[task][i] for s in scores if task in s) for i in (0, 1)]
        for task in TASKS
        if any(task in s for s in scores)
    }
    counts["all"] = [sum(c[i] for c in counts.values()) for i in (0, 1)]
    return {task: right / of for task, (right, of) in counts.items()}


def _main(bundle: str, target: str, *words: str) -> None:
    from edgevlm.runtimes.loading import LoadOptions

    scenes, threads, kv, *follow = words
    options = LoadOptions(threads=int(threads) or None, kv=kv or None)
    found = _watch(Path(bundle), options, int(scenes), Path(follow[0]) if follow else None)
    np.savez(target, **found)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except EdgeVLMError as error:
        sys.exit(str(error))
