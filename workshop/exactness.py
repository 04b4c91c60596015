"""Distance of each precision and each published layout from the original, on tiny random models.

    python -m workshop.exactness [--only tinygpt-v] [--out docs/exactness.md]

Every row is an export with its parity check: the bundle answers in its own process, transformers
(eager, float32) in another, and what the manifest records is printed. Random weights have no
redundancy, so a quantization that trained weights hardly notice shows here at its worst.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click

from edgevlm.bundle import Bundle
from edgevlm.export import export_bundle
from tests.checkpoints import tinygptv as tinygptv_checkpoints
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.fastvlm import write_fastvlm
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import ORIGINALS, write_llava
from tests.checkpoints.llava_next import write_next
from tests.checkpoints.llava_onevision import OWN, write_onevision
from tests.checkpoints.moondream2 import write_moondream2
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.phi3_v import write_phi3_v
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv

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

Made by `python -m workshop.exactness --out docs/exactness.md`: tiny random checkpoints in
the published layouts (two or three decoder layers of width 256, logits of standard deviation about
5) against transformers in float32 with eager attention, over the prefix and 16 greedy tokens. For
the original layouts of LLaVA's shape, which transformers does not read, its CLIP and LLaMA are
joined by a connector computed apart from the one that is exported; for TinyGPT-V its Q-Former and
its Phi, with the two norms added, stand behind a tower that is computed plainly, and so do
InternVL's own layout and FastVLM. Moondream2's and Phi-3-Vision's code, which transformers has not
either, is written anew.

* tokens: texts of a corpus (accents, CJK, emoji, runs of spaces, `<loc>`) tokenized differently
* pixels: largest difference
* features, embeddings: 1 - cosine of the worst row
* prefill, answer: largest difference of a logit after the prefix / anywhere, in standard deviations
* divergence: mean KL divergence of the next-token distribution, nats
* greedy: by how much the original prefers its own token where the two choose differently, in
  standard deviations; 0 means identical tokens

"""


Models = Mapping[str, Callable[[Path], Path]]
# Exported at every precision; the layouts below at full precision alone.
_MODELS: Models = {
    "PaliGemma 1": lambda folder: write_paligemma(folder, version=1),
    "PaliGemma 2": lambda folder: write_paligemma(folder, version=2),
    "MobilePALO": write_llava,
    "LLaVA, Phi-3": partial(write_llava, **ORIGINALS["llava-phi3"]),
    "LLaVA, LLaMA-3": partial(write_llava, **ORIGINALS["llava-llama3"]),
    "TinyGPT-V": partial(write_tinygptv, stage=4),
    "SmolVLM": write_smolvlm,
    "InternVL 3": write_internvl,
    "Gemma 3": write_gemma3,
    "Qwen2-VL": write_qwen2_vl,
    "Qwen2.5-VL": partial(write_qwen2_vl, new=True, nested=True),
    "Moondream2": write_moondream2,
    "LLaVA-NeXT": write_next,
    "LLaVA-OneVision": write_onevision,
    "DeepSeek-VL": write_deepseek_vl,
    "Phi-3.5-Vision": write_phi3_v,
    "FastVLM": write_fastvlm,
}
_LAYOUTS: Models = {
    **{name: partial(write_llava, **options) for name, options in ORIGINALS.items()},
    **{
        f"llava-1.5, transformers ({layout})": partial(write_llava, layout=layout)
        for layout in ("hf", "hf-4.52")
    },
    **{
        f"{name}, transformers": partial(write_llava, layout="hf", vocabulary=vocabulary)
        for name, vocabulary in (("llava-phi3", "phi3"), ("llava-llama3", "llama3"))
    },
    **{
        f"tinygpt-v, {name}": partial(write_tinygptv, **options)
        for name, options in tinygptv_checkpoints.ORIGINALS.items()
    },
    "smolvlm2, bf16": partial(write_smolvlm, model_type="smolvlm", dtype="bfloat16"),
    "smolvlm-2.2b, first": partial(write_smolvlm, places=False, factor=2),
    "internvl-3, original": partial(write_internvl, layout="own", files="pair"),
    "internvl-2-2b, original": partial(write_internvl, layout="own", internlm2=True),
    "llava-next, original": partial(write_next, layout="own"),
    "llava-onevision, original": partial(write_onevision, **OWN),
    "deepseek-vl, transformers": partial(write_deepseek_vl, layout="hf"),
    "fastvlm, training": partial(write_fastvlm, form="training"),
    "fastvlm, transformers": partial(write_fastvlm, layout="hf", files="json", tied=False),
}


def table(rows: list[tuple[str, str, str, Bundle]]) -> str:
    """The parity of the bundles as Markdown."""
    lines = [
        f"| model | decoder | vision | {' | '.join(_COLUMNS)} |",
        "|" + "---|" * (3 + len(_COLUMNS)),
    ]
    for name, decoder, vision, bundle in rows:
        worst = {s.stage: f"{s.worst:.2g}" for s in bundle.manifest.parity}
        cells = [name, decoder, vision, *(worst.get(c, "") for c in _COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the page there."
)
@click.option("--only", default="", help="Models whose names hold this text.")
def main(out: Path | None, only: str) -> None:
    """Exports every combination, verified, and prints the tables."""
    if out and only:
        raise click.UsageError("--out writes the page of all models; leave --only out")
    combinations = [(d, v) for d in DECODERS for v in VISIONS]
    with tempfile.TemporaryDirectory() as scratch:
        precisions = table(_rows(Path(scratch), _named(_MODELS, only), combinations))
        layouts = table(_rows(Path(scratch), _named(_LAYOUTS, only), combinations[:1]))
    text = f"## Precisions\n\n{precisions}\n## Original layouts\n\n{layouts}"
    click.echo(text)
    if out:
        out.write_text(_HEAD + text, encoding="utf-8")


def _named(models: Models, only: str) -> Models:
    return {name: write for name, write in models.items() if only.lower() in name.lower()}


def _rows(
    scratch: Path, models: Models, combinations: list[tuple[str, str]]
) -> list[tuple[str, str, str, Bundle]]:
    rows = []
    for name, write in models.items():
        source = write(scratch / name)
        for decoder, vision in combinations:
            target = scratch / f"{name}-{decoder}-{vision}"
            bundle = export_bundle(source, target, quant=decoder, vision_precision=vision)
            rows.append((name, decoder, vision, bundle))
    return rows


if __name__ == "__main__":
    main()
