"""Faults of machines and folders that no other file is about: places, clocks, memory, packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgevlm
from edgevlm import models
from edgevlm.bundle import Bundle, open_bundle, writing
from edgevlm.errors import BundleCorrupt, OutOfMemory
from edgevlm.runtimes.llama import ggml, weights
from edgevlm.runtimes.llama.backends import ON_THE_CPU
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.runtimes.vision.providers import CPU, Offer
from tests import inside

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "shapes.png"
ANSWER = "a red circle, a blue square, a yellow triangle and a green star"
# Blanks, quotes, signs of shells and of URLs, letters of several scripts; and a long one.
NAMES = ("two words", "it's 100% #1 & 'more'", "Größe 圖片 صورة", "n" * 200)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one's own, which answers as pico does."""
    return Path(shutil.copytree(models.built_in(), tmp_path / "mine"))


def caption(model: str | Path) -> str:
    with edgevlm.load(model, cache=False) as vlm:
        return vlm.ask("caption en", SHAPES).text


@pytest.mark.fault(
    "Bundles", "a folder with blanks, signs, 200 letters or any script in its name", "works"
)
@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders_and_pictures(bundle: Path, tmp_path: Path, name: str) -> None:
    folder = bundle.rename(tmp_path / name)
    picture = Path(shutil.copy(SHAPES, folder / f"{name}.png"))
    done = inside.edgevlm("ask", "caption en", "-m", os.fspath(folder), "-i", os.fspath(picture))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ANSWER}\n", "")


@pytest.mark.fault("Bundles", "a folder, or files in it, that are symbolic links", "works")
def test_links(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(bundle.iterdir()):
        target = path.rename(blobs / path.name)
        path.symlink_to(target)
    assert caption(tmp_path / "link") == ANSWER


@pytest.mark.fault(
    "Bundles",
    "replaced by another one while it is open",
    "who has it open goes on with the old one",
)
def test_replaced_while_open(bundle: Path, paligemma_bundle: Bundle) -> None:
    with edgevlm.load(bundle, cache=False) as vlm:
        with writing(bundle) as part:
            shutil.copytree(paligemma_bundle.folder, part, dirs_exist_ok=True)
        assert vlm.ask("caption en", SHAPES).text == ANSWER
    assert open_bundle(bundle, "full").manifest.name == paligemma_bundle.manifest.name


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no files that are open")
@pytest.mark.fault("Bundles", "removed while it is open", "who has it open goes on")
def test_removed_while_open(bundle: Path) -> None:
    with edgevlm.load(bundle, cache=False) as vlm:
        shutil.rmtree(bundle)
        assert vlm.ask("caption en", SHAPES).text == ANSWER


@pytest.mark.fault(
    "Bundles", "on a disk that is read-only", "works: nothing is ever written into a bundle"
)
def test_nothing_is_written_into_a_bundle(bundle: Path) -> None:
    def seen() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in [bundle, *bundle.rglob("*")]}

    before = seen()
    assert caption(bundle) == ANSWER
    assert inside.edgevlm("models", "verify", os.fspath(bundle)).returncode == 0
    assert seen() == before


@pytest.mark.fault(
    "Python",
    "the clock jumps by years in either direction",
    "answers, caches and times are as ever",
)
@pytest.mark.parametrize("years", [-40, 40])
def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.setenv("EDGEVLM_CACHE_SIZE", "10MB")
    now = time.time
    with edgevlm.load("pico") as vlm:
        first = vlm.ask("caption en", SHAPES)
        monkeypatch.setattr(time, "time", lambda: now() + years * 365 * 86400)
        second = vlm.ask("caption en", SHAPES)
    assert first.text == second.text == ANSWER
    assert second.timings.total_ms >= 0 and second.timings.first_token_ms >= 0
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time(), time.time()))
    with edgevlm.load("pico") as vlm:
        third = vlm.ask("caption en", SHAPES)
    assert third.text == ANSWER and third.timings.vision_ms == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the current folder")
@pytest.mark.fault(
    "Home", "the current folder was removed", "works; relative names are not found, in one line"
)
def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    start = "import os, sys; os.rmdir(os.getcwd()); from edgevlm.cli import main; main()"

    def ask(picture: str) -> tuple[int, str, str]:
        folder = tmp_path / "here"
        folder.mkdir()
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", start, "ask", "caption en", "-m", "pico", "-i", picture],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | path,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    assert ask(str(SHAPES)) == (0, f"{ANSWER}\n", "")
    assert ask("shapes.png") == (1, "", "edgevlm: shapes.png: no such file\n")


@pytest.mark.fault("Home", "TMPDIR names no folder", "answers as ever")
def test_a_temporary_folder_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert caption("pico") == ANSWER


@pytest.mark.fault(
    "Memory",
    "an engine is refused memory for its weights or its threads",
    "one line; the bundle is not blamed",
)
@pytest.mark.parametrize(
    "reason",
    [
        "[ONNXRuntimeError] : 1 : FAIL : Load model from x failed:std::bad_alloc",
        "env.cc:327 PosixThread pthread_create failed, error code: 11",
        "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 1",
    ],
)
def test_an_encoder_that_memory_does_not_hold(bundle: Path, reason: str) -> None:
    class Module:
        """onnxruntime without memory."""

        SessionOptions = Ort().module.SessionOptions

        def InferenceSession(self, *_: object, **__: object) -> None:
            raise RuntimeError(reason)

    with pytest.raises(OutOfMemory, match=r"vision.onnx: not enough memory; close other programs"):
        Ort(Module()).session(bundle / "vision.onnx", Offer(CPU, ""), 1, False, bundle)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (["mmap failed: Cannot allocate memory", "failed to load model"], OutOfMemory),
        (["tensor 'x' is missing", "failed to load model"], BundleCorrupt),
    ],
)
def test_a_decoder_that_memory_does_not_hold(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], error: type[Exception]
) -> None:
    def load(*_: object) -> None:
        ggml.log.extend(said)

    monkeypatch.setattr(llama, "llama_model_load_from_file", load)
    spec = open_bundle(bundle).manifest.decoder
    with pytest.raises(error, match=r"decoder.gguf"):
        weights.load(bundle / "decoder.gguf", spec, ON_THE_CPU, repack=True)


# As `ulimit -v` does it, in the process itself.
_LIMITED = """
import resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
from edgevlm.cli import main
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no address-space limit")
@pytest.mark.fault(
    "Memory",
    "an address-space limit (`ulimit -v`) in which engines would end the process",
    "refused in numbers before a model is loaded",
)
@pytest.mark.parametrize(("size", "answer"), [(400 << 20, ""), (8 << 30, ANSWER + "\n")])
def test_addresses_that_are_limited(size: int, answer: str) -> None:
    words = ["ask", "caption en", "-i", str(SHAPES), "-m", "pico", "--threads", "1", "--no-cache"]
    # OpenBLAS takes some for every core, which numpy is imported with.
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LIMITED, str(size), *words]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (not answer, answer)
    if not answer:
        assert re.fullmatch(
            r"edgevlm: the address-space limit \(ulimit -v\) leaves .* at threads=1 and this "
            r"model needs about .*; raise it, take fewer threads, .*\n",
            done.stderr,
        )


def _no_memory(*_: object, **__: object) -> Any:
    raise MemoryError


def _broken(*_: object, **__: object) -> Any:
    raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")


def _own_bug(*_: object, **__: object) -> Any:
    raise ImportError("cannot import name 'x' from 'edgevlm.api'", name="edgevlm.api")


@pytest.mark.fault("Memory", "Python gets no memory", "one line, exit code 1")
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (_no_memory, "edgevlm: not enough memory; close other programs or take less at once\n"),
        (
            _broken,
            "edgevlm: onnxruntime cannot be loaded (No module named 'onnxruntime'); free memory if "
            "that is short, or install edgevlm again\n",
        ),
    ],
)
def test_what_python_cannot_have(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], line: str
) -> None:
    monkeypatch.setattr(edgevlm, "load", fault)
    monkeypatch.setattr("edgevlm.api.load", fault)
    done = inside.edgevlm("ask", "caption en", "-m", "pico", "-i", str(SHAPES))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.fault(
    "Memory",
    "a package of others cannot be loaded",
    "one line that names it; a bug of edgevlm's own keeps its traceback",
)
def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgevlm, "load", _own_bug)
    monkeypatch.setattr("edgevlm.api.load", _own_bug)
    done = inside.edgevlm("ask", "caption en", "-m", "pico", "-i", str(SHAPES))
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
