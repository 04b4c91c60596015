"""Two precisions of a model are told apart by numbers, and a bundle equals itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.benchmarks.quality import measure
from edgevlm.bundle import Bundle
from edgevlm.errors import BenchError
from edgevlm.export import export_bundle
from edgevlm.models import resolve


def test_a_bundle_equals_itself_and_pico_answers(tmp_path: Path) -> None:
    found = measure(resolve(None), resolve(None), 2, threads=1)
    assert found.features_cosine == pytest.approx(1, abs=1e-12)
    assert found.embeddings_cosine == pytest.approx(1, abs=1e-12)
    assert (found.logit_kl, found.top1_agreement) == (0, 1)
    assert found.positions > 2
    assert {"caption", "detect", "all"} <= found.accuracy.keys()
    # Four scenes of some eight questions each, of which pico answers nearly all.
    assert 0.6 < found.accuracy["all"] <= 1


def test_a_coarser_precision_is_further_away(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    coarse = export_bundle(paligemma_checkpoint, tmp_path / "coarse", quant="q4_0", verify=False)
    found = measure(coarse.folder, paligemma_bundle.folder, 3, threads=1)
    assert 0.99 < found.features_cosine < 1 - 1e-6
    assert 0.99 < found.embeddings_cosine < 1 - 1e-6
    assert 0.01 < found.logit_kl < 20
    assert found.top1_agreement < 1
    assert found.accuracy == {}  # only pico knows the scenes


def test_two_models_are_not_compared(paligemma_bundle: Bundle, paligemma2_bundle: Bundle) -> None:
    with pytest.raises(BenchError, match="two models .their decoder differs"):
        measure(paligemma_bundle.folder, paligemma2_bundle.folder, 1)


def test_what_the_child_says_reaches_the_caller(paligemma_bundle: Bundle, tmp_path: Path) -> None:
    from edgevlm.benchmarks.quality import observe

    with pytest.raises(BenchError, match="nowhere: cannot be measured .*no such bundle folder"):
        observe(tmp_path / "nowhere", tmp_path / "out.npz", 1)
