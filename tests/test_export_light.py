"""Exports where torch, transformers and optimum are not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.errors import EngineMissing
from edgevlm.export import export_bundle
from edgevlm.export.options import UNCOMPARED
from edgevlm.export.parity import compare
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.llava_next import write_next
from tests.checkpoints.smolvlm import write_smolvlm

# Nothing that runs before the command can import any of them.
WITHOUT = """
import sys
heavy = ("torch", "transformers", "optimum", "safetensors", "tokenizers", "onnxscript")
sys.modules.update(dict.fromkeys(heavy))
"""
COMMAND = "from edgevlm.cli import main; main()"


def light(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process without the heavy packages."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=Path(__file__).parent.parent,
        check=False,
    )


@pytest.mark.parametrize("write", [write_smolvlm, write_llava, write_internvl, write_next])
def test_the_same_bundle_as_with_the_packages(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    done = light(COMMAND, "export", source, tmp_path / "light", "--quant", "f16")
    assert done.returncode == 0, done.stderr
    (line,) = (text for text in done.stderr.splitlines() if "not compared" in text)
    assert line == f"Note: {UNCOMPARED}."
    made = open_bundle(tmp_path / "light", "full").manifest
    assert made.notes[-1] == UNCOMPARED and not made.parity
    full = export_bundle(source, tmp_path / "full", quant="f16", verify=False).manifest
    assert made.components == full.components and UNCOMPARED not in full.notes


def test_what_needs_the_packages_says_so_first(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = light(COMMAND, "export", tmp_path / "no such source", out, "--verify")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "verification needs torch and transformers (torch is not there)" in done.stderr
    assert 'pip install "edgevlm[export]"' in done.stderr and "--no-verify" in done.stderr
    done = light(COMMAND, "export", paligemma_checkpoint, out, "--no-verify")
    assert done.returncode == 0 and "not compared" not in done.stderr
    assert not open_bundle(out).manifest.notes


def test_weights_in_torchs_format_name_their_cure(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", weights="bin")
    done = light(COMMAND, "export", source, tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert 'need torch (torch is not there); pip install "edgevlm[export]"' in done.stderr


def test_a_synthetic_model_is_made_and_answers(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from edgevlm.benchmarks.synthetic.make import make
from edgevlm.family import Source
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_hidden_layers": 2, "vocab_size": 1000}
vision = sizes | {"patch_size": 14, "image_size": 56}
text = sizes | {"model_type": "gemma", "head_dim": 64, "num_key_value_heads": 1}
config = {"model_type": "paligemma", "image_token_index": 900, "vision_config": vision}
make(Path(sys.argv[1]), "small", Source({"config.json": config | {"text_config": text}}), "q8_0")
"""
    done = light(code, tmp_path / "small")
    assert done.returncode == 0, done.stderr
    with edgevlm.load(tmp_path / "small") as vlm:
        assert vlm.image_embeddings(np.zeros((56, 56, 3), np.uint8)).shape == (16, 256)


def test_an_export_is_compared_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare.wanted(None) and compare.wanted(True) and not compare.wanted(False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert not compare.wanted(None) and not compare.wanted(False)
    with pytest.raises(EngineMissing, match=r"\(transformers is not there\)"):
        compare.wanted(True)
