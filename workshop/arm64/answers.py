"""`python -m workshop.arm64.answers BUNDLES OUT [REFERENCE]`: this machine's numbers.

Runs on both machines, in the environment that edgevlm is installed in, without torch. Every stage
of an answer of every bundle goes into OUT as an npz file; a bundle whose name ends otherwise than
in `-f32` reads the tokens that its `-f32` answered in REFERENCE. OUT/machine.json says what ran.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

import edgevlm
from edgevlm.benchmarks.scenes.evaluate import GENERATORS, evaluate
from edgevlm.export.parity.compare import N_TOKENS, PROMPT
from edgevlm.export.parity.images import scene
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.loading import LoadOptions, load_bundle
from edgevlm.runtimes.stages import stages

EXACT = "-f32"
# Of each drawing routine; about eight questions each.
SCENES = 8


def answer(bundle: Path, out: Path, reference: Path | None) -> None:
    """Writes the stages of one bundle's answer, about what the exporter holds bundles to."""
    name, _, precision = bundle.name.rpartition("-")
    follow = None
    if f"-{precision}" != EXACT:
        follow = np.load((reference or out) / f"{name}{EXACT}.npz")["tokens"].tolist()
    with load_bundle(bundle, LoadOptions(device="cpu", threads=1)) as vlm:
        made = stages(vlm.engines, PROMPT, scene(), N_TOKENS, follow=follow)
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    np.savez_compressed(out / f"{bundle.name}.npz", **fields)


class OneThread:
    """The built-in model on one thread: several would wait for one another in an emulator."""

    def __init__(self) -> None:
        self.vlm = edgevlm.load(device="cpu", threads=1)

    def answers(self, picture: Image.Image, prompts: Sequence[str]) -> list[str]:
        """One answer for each prompt."""
        return [self.vlm.ask(prompt, picture).text for prompt in prompts]


def pico() -> dict[str, list[int]]:
    """Right answers and all answers of the built-in model by drawing routine."""
    answerer, found = OneThread(), {}
    for generator in GENERATORS:
        counts = evaluate(answerer, generator, SCENES).counts.values()
        found[generator] = [sum(right for right, _ in counts), sum(of for _, of in counts)]
    return found


def back_end() -> str:
    """The file of ggml's CPU back end that this process has loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {Path(line.split()[-1]).name for line in maps if "libggml-cpu" in line}
    return ", ".join(sorted(files))


def main() -> None:
    """Computes everything and says how long it took."""
    bundles, out, *more = map(Path, sys.argv[1:])
    reference = more[0] if more else None
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # The exact ones first: the others follow them.
    for bundle in sorted(bundles.iterdir(), key=lambda b: (not b.name.endswith(EXACT), b.name)):
        answer(bundle, out, reference)
    found = {
        "machine": platform.machine(),
        "features": ggml.cpu_features(),
        "back_end": back_end(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("edgevlm", "llama-cpp-python", "onnxruntime")},
        "pico": pico(),
        "seconds": time.monotonic() - start,
    }
    (out / "machine.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
