"""The decoder's cache in 8 bits: near f16, and refused where the heads do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.errors import EngineError, PromptError
from edgevlm.export import export_bundle
from edgevlm.export.parity.metrics import divergence
from edgevlm.runtimes.session import VLM
from tests.checkpoints.paligemma import write_paligemma

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"


def logits(vlm: VLM) -> np.ndarray:
    """After a prefix of picture and question, and after each of three tokens; [4, n_vocab]."""
    vlm.ask("answer en what shape is red?", SHAPES, max_tokens=1)
    decoder = vlm.engines.decoder
    return np.concatenate([decoder.logits()[None], decoder.extend([5, 6, 7])])


@pytest.mark.parametrize("version", [1, 2])
def test_logits_stay_near(tmp_path: Path, version: int) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", version=version)
    export_bundle(folder, tmp_path / "out", quant="f16", vision_precision="fp32", verify=False)
    found = {}
    for kv in ("f16", "q8_0"):
        with edgevlm.load(tmp_path / "out", kv=kv) as vlm:
            found[kv] = logits(vlm)
    error = np.abs(found["q8_0"] - found["f16"]).max() / found["f16"].std()
    # 8-bit blocks keep keys and values to 0.4 % of their largest; tiny random attention is sharp.
    # A prefix read causally, or a cache in another order, would be off by more than one.
    assert 0 < error < 0.3
    assert divergence(found["q8_0"], found["f16"]) < 0.02


def test_pico_answers_alike() -> None:
    prompts = ("answer en what shape is red?", "caption en", "detect circle")
    answers = []
    for kv in (None, "f16", "q8_0"):
        with edgevlm.load(kv=kv) as vlm:
            answers.append([vlm.ask(prompt, SHAPES).text for prompt in prompts])
    assert answers[0] == answers[1]
    assert answers[2][:2] == answers[0][:2]


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", head_dim=40)
    export_bundle(folder, tmp_path / "out", quant="f16", vision_precision="fp32", verify=False)
    with pytest.raises(
        EngineError, match="a multiple of 32 values and this decoder's have 40; use f16"
    ):
        edgevlm.load(tmp_path / "out", kv="q8_0")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(PromptError, match="kv 'q4_0' is not known; choose f16 or q8_0"):
        edgevlm.load(kv="q4_0")
