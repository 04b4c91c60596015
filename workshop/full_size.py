"""The full-size proof: random models of real size are written, exported, and asked about a picture.

    python -m workshop.full_size /path/with/20GB [--model NAME]... [--peers]

The checkpoints have the published layouts, names, shapes and number types and random weights
(published.py), so that the numbers are those of the real models and the answers are noise. Each
export, answer and turn of an engine runs in a child process of its own. What is printed is one
Markdown table.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from edgevlm.benchmarks.latency.files import default_picture
from edgevlm.benchmarks.latency.report import PeerResult
from edgevlm.benchmarks.peers.run import OURS, Comparison, beside
from edgevlm.bundle import open_bundle
from edgevlm.machine import usable_cpus
from workshop.published import WRITERS, write

# Peaks that models must stay below, or the command fails: an export without verification and an
# answer, in GB; None where there is no goal.
GOALS: dict[str, tuple[float | None, float | None]] = {
    "paligemma-3b-224": (6, 3),
    "mobilepalo-1.7b": (4, 3),
    "tiny-llava-v1": (4, 3),
    "tinygptv": (8, 6),
    "smolvlm-256m": (None, 0.7),
}
_PROMPT = "What is in the picture?"
_PROMPTS = {"paligemma-3b-224": "answer en what is in the picture?"}


# Those that a person would take instead.
_PEERS = ("mtmd", "transformers_cpu")
_HEAD = (
    "| model | engine | export | on disk | ask, 16 tokens, start to end "
    "| first token | decode | peak memory |"
)


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


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _cost(measured: Measured) -> str:
    return f"{measured.seconds:.0f} s, {measured.peak_bytes / 1e9:.2f} GB"


def _engine(result: PeerResult) -> str:
    """An engine's own cells: first token, decode, peak memory; or why there are none."""
    if result.error:
        return f"{result.error.replace('|', '/')} | - | -"
    of = {name: metric.median for name, metric in result.metrics.items()}
    first, tokens = of["first_token_ms"] / 1e3, 1e3 / of["token_ms"]
    peak = f"{of['peak_rss_bytes'] / 1e9:.2f} GB" if "peak_rss_bytes" in of else "-"
    return f"{first:.2f} s | {tokens:.1f} tokens/s | {peak}"


@dataclass(frozen=True)
class _Run:
    """Models in a folder, a picture to ask them about, precisions, and the engines' turns."""

    folder: Path
    image: Path
    quant: str
    vision_precision: str
    verify: bool
    peers: tuple[str, ...]
    rounds: int
    above: list[str] = field(default_factory=list)

    def rows(self, model: str) -> Iterator[str]:
        """Writes, exports and asks a model; its rows of the table, edgevlm's first."""
        checkpoint, bundle = self.folder / model, self.folder / f"{model}-bundle"
        more = write(model, checkpoint)
        how = ["--quant", self.quant, "--vision-precision", self.vision_precision, *more]
        check = "--verify" if self.verify else "--no-verify"
        exported = measure(["export", str(checkpoint), str(bundle), *how, check])
        words = _PROMPTS.get(model, _PROMPT)
        asked = measure(
            ["ask", words, "-i", str(self.image), "-m", str(bundle), "--max-tokens", "16"]
        )
        comparison = Comparison(
            bundle=open_bundle(bundle),
            image=self.image,
            words=words,
            checkpoint=checkpoint,
            tower=Path(more[1]) if more else None,
            rounds=self.rounds,
            only=(OURS, *self.peers),
        )
        found = beside(comparison, model, lambda text: click.echo(text, err=True))
        self._judge(model, exported, asked)
        own = f"{_cost(exported)} | {_size(bundle) / 1e6:.0f} MB | {_cost(asked)}"
        for i, result in enumerate(found.results):
            name, cells = ("", "| |") if i else (model, own)
            engine = f"{result.title} {result.version}".strip()
            if result.positions not in (0, found.results[0].positions):
                engine += f", {result.positions} positions"
            yield f"| {name} | {engine} | {cells} | {_engine(result)} |"

    def _judge(self, model: str, exported: Measured, asked: Measured) -> None:
        """Notes peaks above the goals; a comparison in the same process has a peak of its own."""
        goals = (None, None) if self.verify else GOALS.get(model, (None, None))
        for what, one, goal in zip(("export", "ask"), (exported, asked), goals, strict=True):
            if goal and one.peak_bytes > goal * 1e9:
                self.above.append(f"{model}: {what} took {one.peak_bytes / 1e9:.2f} of {goal} GB")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--model",
    "models",
    type=click.Choice(list(WRITERS)),
    multiple=True,
    default=["paligemma-3b-224"],
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--image", type=click.Path(exists=True, path_type=Path), help="A picture to ask about."
)
@click.option("--quant", default="q4_k_m", show_default=True)
@click.option("--vision-precision", default="int8", show_default=True)
@click.option("--verify/--no-verify", default=False, help="Compare with transformers (12 GB).")
@click.option("--peers", is_flag=True, help="Beside llama.cpp and transformers.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(
    folder: Path,
    models: tuple[str, ...],
    image: Path | None,
    quant: str,
    vision_precision: str,
    verify: bool,
    peers: bool,
    rounds: int,
) -> None:
    """Writes, exports and asks random models in FOLDER; prints a Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    others = _PEERS if peers else ()
    picture = image or default_picture(folder)
    run = _Run(folder, picture, quant, vision_precision, verify, others, rounds)
    rows = [row for model in models for row in run.rows(model)]
    click.echo(
        f"{platform.machine()}, {usable_cpus()} cores, {quant} + {vision_precision}, "
        f"medians of {rounds}\n"
    )
    click.echo("\n".join([_HEAD, "|" + "---|" * 8, *rows]))
    if run.above:
        raise click.ClickException("; ".join(run.above))


if __name__ == "__main__":
    main()
