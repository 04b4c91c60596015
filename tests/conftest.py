"""Checkpoints and bundles that many tests share; each is made once per session."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.bundle import Bundle
from tests import inside
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.smolvlm import write_smolvlm
from tests.hub import Hub, serve

# A run in the background inherits an ignored Ctrl-C; the programs that tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing of a test's pictures is kept in the user's cache, and nothing is read there.
os.environ["EDGEVLM_CACHE_SIZE"] = "0"
# Nor is what was found of this machine.
_home = tempfile.TemporaryDirectory(prefix="edgevlm-tests-")
os.environ["EDGEVLM_HOME"] = _home.name

# Two engines that both want every core wait for one another; each worker of pytest-xdist, and what
# it starts, gets a core of its own.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="module")
def children_inside() -> Iterator[None]:
    """See tests.inside.children. For files about a family; `tests/test_families.py` exports one of
    each as users do.
    """
    with inside.children():
        yield


@pytest.fixture(scope="session")
def paligemma_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PaliGemma 1 checkpoint in the published layout; treat as read-only."""
    return write_paligemma(tmp_path_factory.mktemp("paligemma"), version=1)


@pytest.fixture(scope="session")
def smolvlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLM checkpoint in the published layout; treat as read-only."""
    return write_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture
def hub(smolvlm_checkpoint: Path) -> Iterator[Hub]:
    """A hub with `smolvlm_checkpoint` as the repository tests.hub.TINY."""
    with serve(tiny_smolvlm=smolvlm_checkpoint) as served:
        yield served


@pytest.fixture(scope="session")
def paligemma2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PaliGemma 2 checkpoint in the published layout; treat as read-only."""
    return write_paligemma(tmp_path_factory.mktemp("paligemma2"), version=2)


@pytest.fixture(scope="session")
def paligemma_bundle(
    paligemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The unquantized bundle (f32, fp32) of `paligemma_checkpoint`; treat as read-only."""
    return _export(paligemma_checkpoint, tmp_path_factory.mktemp("bundles") / "paligemma")


@pytest.fixture(scope="session")
def paligemma2_bundle(
    paligemma2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The unquantized bundle (f32, fp32) of `paligemma2_checkpoint`; treat as read-only."""
    return _export(paligemma2_checkpoint, tmp_path_factory.mktemp("bundles") / "paligemma2")


def _export(checkpoint: Path, out: Path) -> Bundle:
    from edgevlm.export import export_bundle

    return export_bundle(checkpoint, out, quant="f32", vision_precision="fp32", verify=False)
