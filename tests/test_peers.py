"""The comparison with other projects runs, on models of no size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgevlm.benchmarks.llava_checkpoints import write_llava
from edgevlm.benchmarks.peers.__main__ import main
from edgevlm.export import export_bundle


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2", "mlp2x_gelu"])
def test_llama_cpp_answers_from_the_same_weights(projector: str, tmp_path: Path):
    source = write_llava(tmp_path / "source", projector=projector, size=96)
    bundle = export_bundle(source, tmp_path / "out", quant="q8_0", verify=False)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(picture)
    arguments = [source, bundle.folder, "--image", picture, "--rounds", 1, "--tokens", 3]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert [line.split(" | ")[0] for line in done.output.splitlines()[2:]] == [
        "| encode",
        "| first token",
        "| one more token",
    ]
