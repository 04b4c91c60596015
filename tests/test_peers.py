"""Other projects beside edgevlm: those that can answer do, the others say why, nothing is lost."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgevlm.benchmarks.latency.report import PeerResult
from edgevlm.benchmarks.peers import child, optimum_onnx, run
from edgevlm.benchmarks.peers.__main__ import main
from edgevlm.benchmarks.peers.run import Comparison, Peer, beside, known, own_pythons
from edgevlm.benchmarks.synthetic import make as synthetic
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import BenchError
from edgevlm.export import export_bundle
from edgevlm.family import Source
from edgevlm.models import built_in
from tests import inside
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.llava_onevision import write_onevision
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv

Make = Callable[[dict[str, Any]], Bundle]
TIMES = {"encode_ms", "prefill_ms", "first_token_ms", "token_ms"}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def compared(bundle: Bundle, picture: Path, *only: str, **options: Any) -> dict[str, PeerResult]:
    """Results by title, of one turn."""
    # One thread: those of several wait for one another by spinning, for long on a busy machine.
    asked = Comparison(
        bundle, picture, "What is it?", rounds=1, tokens=3, threads=1, only=only, **options
    )
    return {result.title: result for result in beside(asked, "it").results}


def exported(source: Path, out: Path) -> Bundle:
    """Not compared; its quantizer runs in this process."""
    with inside.children():
        return export_bundle(source, out, quant="q8_0", verify=False)


@pytest.fixture
def torch_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that need torch answer in this process, which has imported it; the others do not."""
    apart = run._turn

    def turn(peer: Peer, task: dict[str, Any], python: str | None) -> dict[str, Any]:
        if peer.name not in ("transformers_cpu", "tinygptv_torch"):
            return apart(peer, task, python)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return child.turn(peer.file, json.loads(json.dumps(task)))

    monkeypatch.setattr(run, "_turn", turn)


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2"])
def test_llama_cpp_answers_from_the_same_weights(
    projector: str, picture: Path, tmp_path: Path
) -> None:
    source = write_llava(tmp_path / "source", projector=projector, size=96)
    bundle = exported(source, tmp_path / "out")
    found = compared(bundle, picture, "mtmd", checkpoint=source)
    ours, theirs = found["edgevlm"], found["llama.cpp, multimodal"]
    assert not ours.error and not theirs.error
    assert set(theirs.metrics) == set(ours.metrics) == TIMES | {"peak_rss_bytes"}
    assert theirs.positions == ours.positions


def test_transformers_answers_a_paligemma_with_the_same_positions(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle, picture: Path
) -> None:
    found = compared(paligemma_bundle, picture, "transformers_cpu", "mtmd",
                     checkpoint=paligemma_checkpoint)  # fmt: skip
    theirs = found["transformers"]
    assert not theirs.error and set(theirs.metrics) == TIMES | {"peak_rss_bytes"}
    assert theirs.positions == found["edgevlm"].positions and theirs.version
    assert "no siglip tower" in found["llama.cpp, multimodal"].error


@pytest.mark.usefixtures("torch_inside")
def test_pytorch_answers_a_tinygptv_with_the_same_positions(picture: Path, tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source")
    bundle = exported(source, tmp_path / "out")
    found = compared(bundle, picture, "tinygptv_torch", checkpoint=source)
    ours, theirs = found["edgevlm"], found["PyTorch"]
    assert not theirs.error and set(theirs.metrics) == TIMES | {"peak_rss_bytes"}
    assert theirs.positions == ours.positions


@pytest.mark.usefixtures("torch_inside")
@pytest.mark.parametrize(
    ("write", "options", "multimodal"),
    [
        # llama.cpp looks for a token of two newlines, which a grown vocabulary has.
        pytest.param(write_smolvlm, {"n_vocab": 1000}, True, id="smolvlm"),
        pytest.param(write_internvl, {"layout": "hf"}, True, id="internvl"),
        pytest.param(write_gemma3, {}, True, id="gemma3"),
        pytest.param(write_onevision, {"chat": "onevision"}, False, id="onevision"),
        pytest.param(write_qwen2_vl, {}, True, id="qwen2-vl"),
        pytest.param(write_qwen2_vl, {"new": True, "nested": True}, True, id="qwen2.5-vl"),
    ],
)
def test_peers_answer_about_pictures_of_many_rows(
    write: Callable[..., Path], options: dict[str, Any], multimodal: bool, picture: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = write(tmp_path / "source", **options)
    bundle = exported(source, tmp_path / "out")
    found = compared(bundle, picture, "mtmd", "transformers_cpu", checkpoint=source)
    theirs, library = found["transformers"], found["llama.cpp, multimodal"]
    assert not theirs.error and theirs.positions == found["edgevlm"].positions
    # It has its own rule of tiles, so maybe another number of positions.
    assert bool(library.error) is not multimodal and bool(library.positions) is multimodal


@pytest.fixture
def small_synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a synthetic bundle of a config."""

    def make(config: dict[str, Any]) -> Bundle:
        for module in (synthetic, sys.modules["edgevlm.benchmarks.peers.material"]):
            monkeypatch.setattr(module, "MODELS", {"small": Source({"config.json": config})})
        monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
        return synthetic.synthetic("small", "q8_0")

    return make


@pytest.mark.usefixtures("torch_inside")
def test_a_synthetic_model_needs_no_checkpoint(picture: Path, small_synthetic: Make) -> None:
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 2, "patch_size": 14, "image_size": 56}  # fmt: skip
    text = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
            "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 1100}  # fmt: skip
    config = {"model_type": "llava", "image_token_index": 1000,
              "vision_config": vision | {"model_type": "clip_vision_model"},
              "text_config": text | {"model_type": "llama"}}  # fmt: skip
    found = compared(small_synthetic(config), picture, "mtmd", "llama_cpp_python",
                     "transformers_cpu", "openvino")  # fmt: skip
    assert not found["llama.cpp, multimodal"].error and not found["transformers"].error
    assert not found["llama-cpp-python"].error
    assert {"first_token_ms", "token_ms"} <= set(found["llama-cpp-python"].metrics)
    assert found["transformers"].positions == found["edgevlm"].positions
    assert "--checkpoint" in found["OpenVINO GenAI"].error


def test_optimum_says_which_models_it_cannot_export() -> None:
    pytest.importorskip("optimum.exporters.onnx")
    with pytest.raises(NotImplementedError, match="no export of llava"):
        optimum_onnx.answer({"config": {"model_type": "llava"}})


@pytest.mark.usefixtures("torch_inside")
def test_transformers_computes_in_float32_whatever_the_published_config_says(
    picture: Path, small_synthetic: Make
) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
              "num_attention_heads": 2, "patch_size": 14, "image_size": 28}  # fmt: skip
    text = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 128,
            "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 1100}  # fmt: skip
    config = {"model_type": "paligemma", "torch_dtype": "bfloat16", "projection_dim": 256,
              "image_token_index": 1000,
              "vision_config": vision | {"model_type": "siglip_vision_model"},
              "text_config": text | {"model_type": "gemma", "torch_dtype": "bfloat16"}}  # fmt: skip
    found = compared(small_synthetic(config), picture, "transformers_cpu")["transformers"]
    assert not found.error and set(found.metrics) == TIMES | {"peak_rss_bytes"}


def test_without_a_checkpoint_the_decoder_still_answers(picture: Path) -> None:
    found = compared(open_bundle(built_in()), picture, "llama_text", "mtmd", "transformers_cpu")
    text = found["llama.cpp, text alone"]
    assert set(text.metrics) == {"prefill_ms", "token_ms", "peak_rss_bytes"}
    assert text.positions == found["edgevlm"].positions
    for title in ("llama.cpp, multimodal", "transformers"):
        assert found[title].error == "needs the checkpoint; name it with --checkpoint"
        assert found[title].state == "not asked"


PEERS = {
    "good": "def answer(t):\n print('noise')\n return {'token_ms': 1.0, 'positions': 7}",
    "refuses": "def answer(t):\n raise ValueError('knows no\\n pictures (/a/b/c.py)')",
    "lacks": "def answer(t):\n raise NotImplementedError('has no such model')",
    "dies": "import os, sys\ndef answer(t):\n sys.stderr.write('out of memory')\n os._exit(9)",
    "absent": "def answer(t):\n import no_such_engine",
}
# In place of edgevlm, which the others are told a prompt by.
OURS = """
PACKAGE = 'pip'
def answer(t):
    told = {'before': [1], 'after': [2], 'image_tokens': 5}
    return told | {'first_token_ms': 3.0, 'token_ms': 2.0, 'positions': 7}
"""


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Peers of a few lines beside edgevlm; every turn is noted."""
    files = {}
    for name, code in PEERS.items():
        note = f"with open({str(tmp_path / 'asked')!r}, 'a') as f: f.write('{name} ')\n"
        files[name] = tmp_path / f"{name}.py"
        files[name].write_text(f"PACKAGE = 'pip'\n{note}{code}\n", encoding="utf-8")
    made = {n: Peer(n, n.upper(), f"pip install {n}", (), str(f)) for n, f in files.items()}
    (tmp_path / "ours.py").write_text(OURS, encoding="utf-8")
    ours = replace(known()[run.OURS], file=str(tmp_path / "ours.py"))
    monkeypatch.setattr(run, "known", lambda: {run.OURS: ours, **made})
    return files


def test_a_peer_that_cannot_says_why_and_is_not_asked_again(
    few: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    asked = Comparison(
        open_bundle(built_in()), picture, "caption en", rounds=2, tokens=2, threads=1
    )
    found = {r.title: r for r in beside(asked, "pico").results}
    assert (tmp_path / "asked").read_text(
        encoding="utf-8"
    ) == "good refuses lacks dies absent good "
    assert found["GOOD"].metrics["token_ms"].samples == (1.0, 1.0) and found["GOOD"].positions == 7
    assert found["REFUSES"].error == "ValueError: knows no pictures (c.py)"
    assert found["DIES"].error == "its process ended with status 9 (out of memory)"
    assert found["ABSENT"].error == "No module named 'no_such_engine'; pip install absent"
    assert [r.installed for r in found.values()] == [True, True, True, True, True, False]
    assert [r.state for r in found.values()] == [
        "", "", "failed", "not supported", "failed", "not installed",
    ]  # fmt: skip
    assert found["LACKS"].error == "has no such model"


@pytest.mark.parametrize("python", [None, sys.executable], ids=["ours", "its own"])
def test_a_peer_that_ends_at_once_is_heard_to_the_last_word(
    python: str | None, few: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    pythons = {"dies": python} if python else {}
    found = compared(open_bundle(built_in()), picture, "dies", pythons=pythons)
    assert found["DIES"].error == "its process ended with status 9 (out of memory)"


def test_a_peer_that_ggml_aborts_says_where(
    few: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    said = "/a/b/helper.cpp:226: GGML_ASSERT(idx >= 0) failed\n[process detached]\n"
    code = f"import os, sys\nsys.stderr.write({said!r})\nos.abort()"
    few["dies"].write_text(code, encoding="utf-8")
    found = compared(open_bundle(built_in()), picture, "dies")
    assert found["DIES"].error == "aborts: helper.cpp:226: GGML_ASSERT(idx >= 0) failed"


def test_a_peer_may_have_a_python_of_its_own(few: dict[str, Path], picture: Path) -> None:
    found = compared(open_bundle(built_in()), picture, "good", pythons={"good": sys.executable})
    assert not found["GOOD"].error
    found = compared(open_bundle(built_in()), picture, "good", pythons={"good": "/no/python"})
    assert "python cannot be started" in found["GOOD"].error


def test_an_interrupt_leaves_what_there_is(few: dict[str, Path], picture: Path) -> None:
    turns = []

    def progress(text: str) -> None:
        turns.append(text)
        if "REFUSES" in text:
            raise KeyboardInterrupt

    asked = Comparison(
        open_bundle(built_in()), picture, "caption en", rounds=1, tokens=2, threads=1
    )
    found = beside(asked, "pico", progress)
    assert [r.title for r in found.results] == ["edgevlm", "GOOD"] and not found.complete


def test_unknown_peers_and_pythons_are_refused(picture: Path) -> None:
    with pytest.raises(BenchError, match="unknown peer 'mtdm'; there are ours, "):
        compared(open_bundle(built_in()), picture, "mtdm")
    with pytest.raises(BenchError, match="unknown peer 'x'"):
        own_pythons(["x=/usr/bin/python3"])
    with pytest.raises(BenchError, match="write PEER=PYTHON"):
        own_pythons(["mtmd"])


def test_the_command_prints_a_table(few: dict[str, Path], picture: Path) -> None:
    done = CliRunner().invoke(
        main,
        [str(built_in()), "-i", str(picture), "--rounds", "1", "--tokens", "2", "--threads", "1"],
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"\| GOOD [\d.]+ \| - \| - \| - \| 1.00 ms \|", done.stdout)
    assert "| REFUSES | - | - | failed |" in done.stdout
    assert "| LACKS | - | - | not supported |" in done.stdout
    assert "* REFUSES: ValueError: knows no pictures (c.py)." in done.stdout
