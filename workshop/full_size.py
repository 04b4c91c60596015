"""The full-size proof: a random model of real size is written, exported, and asked about a picture.

    python -m workshop.full_size /path/with/20GB [--model paligemma-3b-224]

The checkpoint has the published layout, names, shapes and number types and random weights
(published.py), so that the numbers are those of the real model and the answers are noise. Export
and answer run in child processes, whose wall time and peak resident memory are printed as a
Markdown table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from edgevlm.machine import usable_cpus
from workshop.published import WRITERS, write

# Peaks that each model must stay below: export and answer, in GB.
GOALS = {
    "paligemma-3b-224": (8, 3),
    "mobilepalo-1.7b": (6, 3),
    "tiny-llava-v1": (6, 3),
    "tinygptv": (12, 6),
}
PROMPTS = {"paligemma-3b-224": "answer en what is in the picture?"}


@dataclass(frozen=True)
class Measured:
    """A child process: seconds of wall time, peak resident bytes of it and its own children."""

    seconds: float
    peak_bytes: int
    stdout: str


# Runs a module and reports the peak memory of the process and of each process it waited for.
_CHILD = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    peaks = [resource.getrusage(w).ru_maxrss
             for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("peak", max(peaks) * 1024, file=sys.stderr)
"""


def measure(arguments: list[str]) -> Measured:
    """Runs `python -m edgevlm ARGUMENTS`; raises click's error if it fails."""
    path = os.pathsep.join(p for p in sys.path if p)
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, "edgevlm", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    seconds = time.perf_counter() - start
    if child.returncode:
        raise click.ClickException(f"edgevlm {arguments[0]} failed:\n{child.stderr[-2000:]}")
    peak = int(child.stderr.rsplit("peak ", 1)[1].split()[0])
    return Measured(seconds, peak, child.stdout)


def _picture(path: Path) -> Path:
    from PIL import Image

    from edgevlm.export.parity.images import scene

    Image.fromarray(scene()).save(path)
    return path


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _row(what: str, measured: Measured, size: int, goal: int) -> str:
    gb = (f"{n / 1e9:.2f} GB" for n in (measured.peak_bytes, size))
    return f"| {what} | {measured.seconds:.0f} s | {' | '.join(gb)} | peak < {goal} GB |"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--model", type=click.Choice(list(WRITERS)), default="paligemma-3b-224", show_default=True
)
@click.option(
    "--image", type=click.Path(exists=True, path_type=Path), help="A picture to ask about."
)
@click.option("--quant", default="q4_k_m", show_default=True)
@click.option("--vision-precision", default="int8", show_default=True)
@click.option("--verify/--no-verify", default=False, help="Compare with transformers (12 GB).")
def main(
    folder: Path, model: str, image: Path | None, quant: str, vision_precision: str, verify: bool
) -> None:
    """Writes, exports and asks a random model in FOLDER; prints a Markdown table."""
    checkpoint, bundle = folder / model, folder / f"{model}-bundle"
    more = write(model, checkpoint)
    image = image or _picture(folder / "picture.png")
    how = ["--quant", quant, "--vision-precision", vision_precision, *more]
    check = "--verify" if verify else "--no-verify"
    exported = measure(["export", str(checkpoint), str(bundle), *how, check])
    question = [PROMPTS.get(model, "What is in the picture?"), "-i", str(image), "-m", str(bundle)]
    answered = measure(["ask", *question, "--max-tokens", "16", "--json"])
    timings = json.loads(answered.stdout.strip().splitlines()[-1])["timings"]
    click.echo(f"{platform.machine()}, {usable_cpus()} cores, {quant} + {vision_precision}\n")
    click.echo("| step | wall time | peak memory | model read | goal |\n|---|---|---|---|---|")
    export_goal, answer_goal = GOALS[model]
    click.echo(_row("export", exported, _size(checkpoint), export_goal))
    click.echo(_row("ask, 16 tokens", answered, _size(bundle), answer_goal))
    click.echo(f"\nTimings of the answer: {json.dumps(timings)}")


if __name__ == "__main__":
    main()
