"""`python -m edgevlm.benchmarks.peers CHECKPOINT BUNDLE`: edgevlm beside llama.cpp, LLaVA's shape.

Both answer the same prompt about the same picture from the same decoder file, llama.cpp with the
tower in half precision and its own defaults, edgevlm with the bundle's. One engine in a process,
turn by turn; medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.export import pipeline
from edgevlm.export.child import command, setting
from edgevlm.runtimes.rules import physical_cores

METRICS = {"encode_ms": "encode", "first_token_ms": "first token", "token_ms": "one more token"}
PROMPT = "What is in the picture?"


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--image", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--vision-tower", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Generated after the first.")
def main(checkpoint: Path, bundle: Path, image: Path, vision_tower: Path | None, rounds: int,
         tokens: int) -> None:  # fmt: skip
    """Compare edgevlm with llama.cpp's multimodal library; prints a Markdown table."""
    from edgevlm.benchmarks.peers.mmproj import write_mmproj

    opened = open_bundle(bundle)
    options = pipeline.Options("q4_k_m", "int8", False, None, vision_tower)
    with tempfile.TemporaryDirectory() as scratch:
        mmproj = Path(scratch) / "mmproj.gguf"
        write_mmproj(pipeline.prepare(checkpoint, options, None), mmproj)
        given: dict[str, Any] = {
            "bundle": str(bundle.absolute()),
            "decoder": str(opened.path("decoder").absolute()),
            "mmproj": str(mmproj),
            "image": str(image.absolute()),
            "prompt": _whole_prompt(opened),
            "words": PROMPT,
            "threads": physical_cores(),
            "n_tokens": tokens,
        }
        modules = {"llama.cpp": "mtmd", "edgevlm": "ours"}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in modules}
        for _ in range(rounds):
            for name, module in modules.items():
                found[name].append(_run(module, given))
    click.echo(table(found))


def _whole_prompt(bundle: Bundle) -> str:
    _, *parts = bundle.manifest.prompt.template
    text = "".join("<__media__>" if p == "{image}" else p.removeprefix(" ") for p in parts)
    return text.replace("{prompt}", PROMPT)


def _run(module: str, given: dict[str, Any]) -> dict[str, float]:
    child = subprocess.run(
        command(f"edgevlm.benchmarks.peers.{module}"),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        **setting(),
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise click.ClickException(f"{module} failed: {last}")
    measured: dict[str, float] = json.loads(child.stdout.strip().splitlines()[-1])
    return measured


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians in milliseconds, and how many times sooner edgevlm is."""
    lines = ["| stage | llama.cpp | edgevlm | ratio |", "|---|---|---|---|"]
    for key, name in METRICS.items():
        theirs, ours = (
            statistics.median(r[key] for r in found[who]) for who in ("llama.cpp", "edgevlm")
        )
        lines.append(f"| {name} | {theirs:.1f} ms | {ours:.1f} ms | {theirs / ours:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
