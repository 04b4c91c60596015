"""How far each precision lies from the original, on tiny random PaliGemma 1 and 2 checkpoints.

    python -m edgevlm.benchmarks.exactness [--out docs/exactness.md]

Every row is an export with its parity check: the bundle answers in its own process, transformers
(eager, float32) in another, and what the manifest records is printed. Random weights have no
redundancy, so a quantization that trained weights hardly notice shows here at its worst.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from edgevlm.benchmarks.checkpoints import write_paligemma
from edgevlm.bundle import Bundle
from edgevlm.export import export_bundle

DECODERS = ("f32", "f16", "q8_0", "q4_k_m")
VISIONS = ("fp32", "int8")
_COLUMNS = (
    "tokens",
    "pixels",
    "features",
    "embeddings",
    "prefill",
    "answer",
    "divergence",
    "greedy",
)
_HEAD = """\
# Exactness

Made by `python -m edgevlm.benchmarks.exactness --out docs/exactness.md`: tiny random checkpoints in
the published layout (three decoder layers of width 256, logits of standard deviation about 5)
against transformers in float32 with eager attention, over the prefix and 16 greedy tokens.

* tokens: texts of a corpus (accents, CJK, emoji, runs of spaces, `<loc>`) tokenized differently
* pixels: largest difference
* features, embeddings: 1 - cosine of the worst row
* prefill, answer: largest difference of a logit after the prefix / anywhere, in standard deviations
* divergence: mean KL divergence of the next-token distribution, nats
* greedy: by how much the original prefers its own token where the two choose differently, in
  standard deviations; 0 means identical tokens

"""


def table(rows: list[tuple[int, str, str, Bundle]]) -> str:
    """The parity of the bundles as Markdown."""
    lines = [
        f"| PaliGemma | decoder | vision | {' | '.join(_COLUMNS)} |",
        "|" + "---|" * (3 + len(_COLUMNS)),
    ]
    for version, decoder, vision, bundle in rows:
        worst = {s.stage: f"{s.worst:.2g}" for s in bundle.manifest.parity}
        cells = [str(version), decoder, vision, *(worst.get(c, "") for c in _COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the page there."
)
def main(out: Path | None) -> None:
    """Exports every combination, verified, and prints the table."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for version in (1, 2):
            source = write_paligemma(Path(scratch) / f"source{version}", version=version)
            for decoder in DECODERS:
                for vision in VISIONS:
                    target = Path(scratch) / f"{version}-{decoder}-{vision}"
                    bundle = export_bundle(source, target, quant=decoder, vision_precision=vision)
                    rows.append((version, decoder, vision, bundle))
    text = table(rows)
    click.echo(text)
    if out:
        out.write_text(_HEAD + text, encoding="utf-8")


if __name__ == "__main__":
    main()
