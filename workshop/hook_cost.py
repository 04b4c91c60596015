"""Cost of adding a decoder's norms to llama.cpp's graph.

    python -m workshop.hook_cost BUNDLE

The same file is read with the hook and without it (then its answers mean nothing), in turn, and
the times of a prefill and of single tokens are printed as a Markdown table of medians.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from unittest import mock

import click
import numpy as np

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.runtimes import rules
from edgevlm.runtimes.engines import sequential
from edgevlm.runtimes.llama import decoder, hooks
from edgevlm.runtimes.loading import open_decoder

Times = tuple[float, float]


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=80, show_default=True, help="Positions of the prefill.")
@click.option("--tokens", default=12, show_default=True, help="Single tokens after it.")
@click.option("--rounds", default=3, show_default=True)
def main(bundle: Path, rows: int, tokens: int, rounds: int) -> None:
    """Measure BUNDLE's decoder with and without what edgevlm adds to llama.cpp's graph."""
    opened = open_bundle(bundle)
    if not opened.manifest.decoder.extra_norms:
        raise click.ClickException(f"{bundle}: nothing is added to this decoder's graph")
    found: dict[bool, list[Times]] = {False: [], True: []}
    for _ in range(rounds):
        for hooked, times in found.items():
            times.append(measure(opened, hooked, rows, tokens))
    click.echo("| | prefill | one more token |\n|---|---|---|")
    for hooked, times in found.items():
        prefill, token = (statistics.median(column) for column in zip(*times, strict=True))
        name = "with the norms" if hooked else "llama.cpp's graph alone"
        click.echo(f"| {name} | {prefill:.2f} s | {token * 1e3:.1f} ms |")


def measure(bundle: Bundle, hooked: bool, rows: int, tokens: int) -> Times:
    """Seconds of a prefill and, the median, of a token after it."""
    spec = bundle.manifest.decoder
    data = np.random.default_rng(0).standard_normal((rows, spec.n_embd), np.float32)
    hook = hooks.graph_hook if hooked else _nothing
    with mock.patch.object(decoder, "graph_hook", hook):
        text, _ = open_decoder(bundle, "cpu", [], rules.settings(rules.this_machine()))
    start = time.perf_counter()
    text.prefill([sequential(data, "causal")], room=tokens + 2)
    prefill = time.perf_counter() - start
    steps = []
    for token in range(tokens + 2):
        start = time.perf_counter()
        text.step(token)
        steps.append(time.perf_counter() - start)
    text.close()
    return prefill, statistics.median(steps[2:])


def _nothing(*_: object, **__: object) -> None:
    return None


if __name__ == "__main__":
    main()
