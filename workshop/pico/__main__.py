"""The command line of pico: ``python -m workshop.pico draw | train | read |
evaluate | examples | assets``.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgevlm.benchmarks.scenes.evaluate import Answerer


@click.group()
def main() -> None:
    """Draws the scenes of pico, the built-in model, trains it and measures it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shards", default=140, show_default=True, help="Shards of 2048 scenes.")
@click.option("--workers", default=2, show_default=True, help="Processes.")
def draw(folder: Path, shards: int, workers: int) -> None:
    """Draw the training scenes into FOLDER/data (77 MB a shard)."""
    from workshop.pico.shards import draw_shards

    draw_shards(folder / "data", range(shards), workers)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--save-every", default=200, show_default=True, help="Steps between snapshots.")
@click.option(
    "--resume/--restart", default=True, help="Continue from FOLDER/snapshot.pt when it is there."
)
@click.option(
    "--start-from",
    type=click.Path(path_type=Path, exists=True),
    help="Checkpoint folder with trained weights to go on from, in a schedule of their own.",
)
def train(folder: Path, save_every: int, resume: bool, start_from: Path | None) -> None:
    """Train pico on the scenes of FOLDER/data; the checkpoint is FOLDER/hf-latest."""
    import torch

    from workshop.pico.model import PicoConfig
    from workshop.pico.schedule import CONTINUED, Schedule
    from workshop.pico.train import Trainer

    torch.set_num_threads(1)  # the trainer has threads of its own
    if start_from:
        # The weights know their own vocabulary.
        shutil.copyfile(start_from / "tokenizer.model", folder / "tokenizer.model")
    trainer = Trainer(folder, PicoConfig(), CONTINUED if start_from else Schedule())
    snapshot = folder / "snapshot.pt"
    if resume and snapshot.exists():
        trainer.resume(snapshot)
    elif start_from:
        trainer.start_from(start_from)
    else:
        trainer.start()
    trainer.run(save_every=save_every)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--start-from",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Checkpoint folder of a trained pico that cannot read.",
)
@click.option("--save-every", default=200, show_default=True, help="Steps between snapshots.")
def read(folder: Path, start_from: Path, save_every: int) -> None:
    """Teach a trained pico to read words; the checkpoint is FOLDER/hf-latest.

    Needs the scenes of FOLDER/data; pages of words are drawn into FOLDER/pages (33 GB, or 1.3
    where FOLDER/letters.safetensors is there). Continues from the snapshots that are there.
    """
    import torch

    from workshop.pico.reading import teach_reading
    from workshop.pico.schedule import ReadingSchedule

    torch.set_num_threads(1)  # the training has threads of its own
    teach_reading(folder, start_from, ReadingSchedule(), save_every)


@main.command()
@click.argument("models", nargs=-1)
@click.option(
    "--scenes", default=500, show_default=True, help="Held-out scenes of each drawing routine."
)
@click.option(
    "--generator",
    type=click.Choice(["training", "simple", "both"]),
    default="both",
    show_default=True,
)
@click.option(
    "--errors", type=click.Path(path_type=Path), help="Write every wrong answer to this file."
)
def evaluate(models: tuple[str, ...], scenes: int, generator: str, errors: Path | None) -> None:
    """Measure MODELS side by side by greedy decoding and print a table.

    A model is a bundle (folder or name), "builtin" for the built-in one, or "torch:FOLDER" for a
    checkpoint folder answered by the torch model that was trained. Without MODELS, the built-in
    one is measured.
    """
    from edgevlm.benchmarks.scenes.evaluate import Scores, table
    from edgevlm.benchmarks.scenes.evaluate import evaluate as measure

    names = ["training", "simple"] if generator == "both" else [generator]
    columns: dict[str, Scores] = {}
    for model in models or ("builtin",):
        answerer = _answerer(model)
        for name in names:
            columns[f"{model}, {name}"] = measure(answerer, name, scenes, _progress(model, name))
    click.echo(table(columns))
    if errors is not None:
        lines = [
            f"{column}\t{scene}\t{prompt}\t{wanted}\t{got}"
            for column, scores in columns.items()
            for scene, prompt, wanted, got in scores.wrong
        ]
        errors.write_text("\n".join(lines) + "\n", encoding="utf-8")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def examples(folder: Path) -> None:
    """Draw the pictures of the examples folder."""
    from workshop.pico.gallery import write_examples

    for path in write_examples(folder):
        click.echo(path)


@main.command()
def assets() -> None:
    """Make the files that scenes are drawn with again.

    Needs the packages fonts-noto-color-emoji and fonts-dejavu-core of Debian, and fonttools.
    """
    from workshop.pico.fonts import write_assets

    for path in write_assets():
        click.echo(path)


def _progress(model: str, generator: str) -> Callable[[int], None]:
    def report(n_scenes: int) -> None:
        if n_scenes % 25 == 0:
            click.echo(f"\r{model}, {generator}: {n_scenes} scenes", err=True, nl=False)

    return report


def _answerer(model: str) -> Answerer:
    from edgevlm.benchmarks.scenes.evaluate import BundleAnswerer

    if not model.startswith("torch:"):
        return BundleAnswerer(None if model == "builtin" else model)
    from workshop.pico.checkpoint import load_checkpoint
    from workshop.pico.decode import TorchAnswerer
    from workshop.pico.tokenizer import Tokenizer

    folder = Path(model.removeprefix("torch:"))
    return TorchAnswerer(load_checkpoint(folder), Tokenizer(folder / "tokenizer.model"))


if __name__ == "__main__":
    main()
