"""`python -m workshop.dual_speed FOLDER [MODEL]...`: CLIP at its real sizes beside other engines.

Writes checkpoints with random weights into FOLDER, exports them with 8-bit towers, and has
`edgevlm bench --peers` print pictures and texts a second, and how near the rows are to
transformers' in float32. Nothing else should run meanwhile: a minute a model and round.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping
from pathlib import Path

import click
import torch

from edgevlm.export import child, export_bundle
from tests.checkpoints.dual import clip_config, write_clip

# Both towers of the published config.json: width, heads, and of the vision tower the patch.
MODELS: Mapping[str, tuple[int, int, int]] = {
    "clip-vit-base-patch32": (512, 8, 32),
    "clip-vit-base-patch16": (512, 8, 16),
}
_DEPTH = 12
_VISION_WIDTH, _VISION_HEADS = 768, 12
_PRECISION = "int8"


def write(name: str, folder: Path) -> Path:
    """Writes a checkpoint unless it is there."""
    width, heads, patch = MODELS[name]
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": heads,
    }
    vision = {
        "hidden_size": _VISION_WIDTH,
        "intermediate_size": 4 * _VISION_WIDTH,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": _VISION_HEADS,
        "image_size": 224,
        "patch_size": patch,
    }
    config = clip_config(text=text, vision=vision, projection_dim=width)
    return folder if folder.exists() else write_clip(folder, config=config, edit=_tamed)


def _tamed(tensors: dict[str, torch.Tensor]) -> None:
    """Matrices that keep the size of what they are given, as trained ones nearly do."""
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor.mul_(1 / (tensor.std().item() * math.sqrt(tensor[0].numel())))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
def main(folder: Path, names: tuple[str, ...], runs: int) -> None:
    """Measures the models NAMES (all without any), whose files are kept in FOLDER."""
    for name in names or MODELS:
        checkpoint, bundle = write(name, folder / name), folder / f"{name}-{_PRECISION}"
        if not bundle.exists():
            export_bundle(checkpoint, bundle, vision_precision=_PRECISION, verify=False)
        options = ("--peers", "--checkpoint", str(checkpoint), "--runs", str(runs))
        command = child.command("edgevlm", "bench", str(bundle), *options)
        done = subprocess.run(command, check=False, env=child.environment())
        if done.returncode:
            raise click.ClickException(f"edgevlm bench of {name} ended with {done.returncode}")


if __name__ == "__main__":
    main()
