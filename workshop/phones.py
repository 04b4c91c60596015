"""`python -m workshop.phones [MODEL]... [--write]`: memory of models at the target `phone`.

Each is made with random weights at its real size, in the target's precisions, and answers twice
about pictures with `--max-memory` at what a phone's app may hold; then it is removed. What is
printed is the most that the process held, or the refusal. `--write` puts it into docs/phones.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from edgevlm.benchmarks.synthetic.make import synthetic
from edgevlm.bundle import Bundle
from edgevlm.byte_sizes import in_gb
from edgevlm.errors import EdgeVLMError
from edgevlm.export.targets import TARGETS
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.loading import LoadOptions, budgeted, choose
from workshop.memory import held

# Memory of the process; a phone has about twice as much for everything.
BUDGETS_GB = (2, 3, 4, 6)
MODELS = (
    "smolvlm-256m",
    "fastvlm-0.5b",
    "internvl3-1b",
    "llava-onevision-0.5b",
    "deepseek-vl-1.3b",
    "mobilepalo-1.7b",
    "moondream2",
    "qwen2-vl-2b",
    "paligemma-3b-224",
    "tinygptv-stage4",
    "gemma-3-4b",
    "phi-3.5-vision",
)
_PAGE = Path(__file__).parent.parent / "docs" / "phones.md"
_BEGIN, _END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def rows(models: Sequence[str]) -> Iterator[str]:
    """A line of a Markdown table for each model, after the head."""
    budgets = [f"{gb} GB" for gb in BUDGETS_GB]
    yield "| model | on disk | " + " | ".join(["no limit", *budgets]) + " |"
    yield "|---" * (len(budgets) + 3) + "|"
    for name in models:
        made: list[str] = []
        bundle = synthetic(name, TARGETS["phone"].quant, made.append)
        try:
            cells = " | ".join(_cells(bundle))
            yield f"| {name} | {in_gb(bundle.bytes)} | {cells} |"
        finally:
            if made:
                shutil.rmtree(bundle.folder)


def _cells(bundle: Bundle) -> Iterator[str]:
    """The most memory that two answers take without a limit and within each, or that it is refused.

    Limits within which the model is held in the same way are measured once.
    """
    settings, _ = choose(bundle, LoadOptions(), ggml.cpu_features(), tunings=False)
    measured = dict[tuple[bool, str], int]()
    for limit in (0, *(gb * 10**9 for gb in BUDGETS_GB)):
        try:
            fit = budgeted(bundle, LoadOptions(max_memory=limit or None), settings, ())
            way = (fit.apart, fit.repacking) if fit else (False, settings.repacking)
            if way not in measured:
                measured[way] = int(str(held(str(bundle.folder), limit)["peak"]))
        except EdgeVLMError as e:
            needed = str(e).partition("needs about ")[2].partition(" (")[0]
            yield f"no: needs {needed}" if needed else f"no: {e}"
            continue
        over = ", over the limit" if 0 < limit < measured[way] else ""
        yield in_gb(measured[way]) + (", in turns" if way[0] else "") + over


@click.command()
@click.argument("models", nargs=-1)
@click.option("--write", is_flag=True, help="Put the table into docs/phones.md.")
def main(models: tuple[str, ...], write: bool) -> None:
    """Measures models at the target `phone` under budgets of memory."""
    lines = []
    for line in rows(models or MODELS):
        print(line, flush=True)
        lines.append(line + "\n")
    if write:
        before, _, rest = _PAGE.read_text(encoding="utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
        _PAGE.write_text(f"{before}{_BEGIN}{''.join(lines)}{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
