"""`edgevlm pull` and what it installs, against a small hub on this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm import catalogue, pulling, store
from edgevlm.benchmarks.synthetic import make
from edgevlm.benchmarks.synthetic.decoder import decoder_bytes
from edgevlm.benchmarks.synthetic.models import MODELS
from edgevlm.errors import BundleError, EngineMissing
from edgevlm.export.parts import net
from edgevlm.hub.repository import RemoteFile, Repository
from edgevlm.models import built_in, resolve
from edgevlm.parts import Part
from tests.hub import COMMIT, ROOT, TINY, WEIGHTS, Fault, Hub, serve

PULL = ("pull", TINY, "--name", "tiny", "--no-verify")
# The command line that says each stage of its work, and waits to be killed at one.
STAGES = """
import sys, time
from edgevlm import cli, progress, store
stage = sys.argv.pop(1)
reach, install = progress.Stage.reach, store.install
def reached(self, done):
    reach(self, done)
    announce(self._name, done)
def announce(name, done=1):
    if name == stage and done:
        print(name, flush=True)
        time.sleep(600)
def installed(*arguments):
    announce("install")
    return install(*arguments)
progress.Stage.reach, store.install = reached, installed
cli.main()
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_from_a_name_to_an_answer_and_back(hub: Hub, tmp_path: Path) -> None:
    pulled = hub.edgevlm(tmp_path, *PULL)
    assert pulled.returncode == 0 and pulled.stdout == ""
    assert f"{TINY} at 1111111, licence apache-2.0" in pulled.stderr
    assert "It is the default model now." in pulled.stderr
    folder = tmp_path / "edgevlm/models/tiny"
    manifest = json.loads((folder / "edgevlm.json").read_text(encoding="utf-8"))
    assert (manifest["name"], manifest["origin"]) == ("tiny", f"{TINY}@{COMMIT}")

    answered = hub.edgevlm(tmp_path, "ask", "Hi", "--max-tokens", "2", "-i", "examples/shapes.png")
    assert answered.returncode == 0 and "pico" not in answered.stderr
    assert "tiny *" in hub.edgevlm(tmp_path, "models").stdout
    asked = len(hub.asked)
    again = hub.edgevlm(tmp_path, *PULL)
    assert again.returncode == 0 and "downloaded already" in again.stderr
    assert len(hub.asked) == asked + 1 and len(hub.downloads) == 1

    used = hub.edgevlm(tmp_path, "du").stdout
    assert "checkpoint" in used and "tiny" in used and "broken" not in used
    freed = hub.edgevlm(tmp_path, "gc")
    assert freed.returncode == 0 and f"{TINY}@1111111" in freed.stdout
    assert not [*(tmp_path / "hub").rglob(WEIGHTS)]
    removed = hub.edgevlm(tmp_path, "rm", "tiny")
    assert "pico is the default model again" in removed.stderr and not folder.exists()
    assert hub.edgevlm(tmp_path, "use").stdout == "pico\n"


def test_other_precisions_replace_a_model(hub: Hub, tmp_path: Path) -> None:
    assert hub.edgevlm(tmp_path, *PULL).returncode == 0
    changed = hub.edgevlm(tmp_path, *PULL, "--quant", "q8_0", "--remove-checkpoint")
    assert changed.returncode == 0 and len(hub.downloads) == 1
    manifest = json.loads((tmp_path / "edgevlm/models/tiny/edgevlm.json").read_text("utf-8"))
    assert manifest["components"]["decoder"]["precision"] == "q8_0"
    # It was there before this pull: not its to remove.
    assert [*(tmp_path / "hub").rglob(WEIGHTS)]


def test_a_checkpoint_goes_where_the_user_says_so(hub: Hub, tmp_path: Path) -> None:
    assert hub.edgevlm(tmp_path, *PULL, "--remove-checkpoint").returncode == 0
    assert not [*(tmp_path / "hub").rglob(WEIGHTS)]
    assert "0.0 MiB" in hub.edgevlm(tmp_path, "gc", "--dry-run").stderr


def test_a_name_that_another_model_has(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(built_in(), tmp_path / "edgevlm/models/tiny")
    refused = hub.edgevlm(tmp_path, *PULL)
    assert refused.returncode == 1 and "is another model" in refused.stderr
    assert not hub.downloads


@pytest.mark.fault(
    "Pull",
    "no network, or HF_HUB_OFFLINE",
    "one line; what was downloaded before is used",
)
def test_offline(hub: Hub, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    refused = hub.edgevlm(tmp_path, *PULL, **offline)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in refused.stderr and not hub.asked
    assert hub.edgevlm(tmp_path, *PULL).returncode == 0
    assert hub.edgevlm(tmp_path, "rm", "tiny").returncode == 0
    asked = len(hub.asked)
    pulled = hub.edgevlm(tmp_path, *PULL, **offline)
    assert pulled.returncode == 0 and "taken from its cache" in pulled.stderr
    assert len(hub.asked) == asked


@pytest.mark.fault(
    "Pull",
    "kill -9 at any stage",
    "the same command finishes; a half-made model is never listed as one",
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("stage", ["download", "decoder", "vision", "install"])
def test_killed_at_any_stage_the_same_command_finishes(
    hub: Hub, tmp_path: Path, stage: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STAGES, stage, *PULL],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=hub.environment(tmp_path),
        cwd=ROOT,
    ) as child:
        said = child.stdout.readline() if child.stdout else ""
        child.kill()
    assert said == f"{stage}\n"
    assert "tiny" not in hub.edgevlm(tmp_path, "models").stdout
    if stage != "download":
        assert "broken pull" in hub.edgevlm(tmp_path, "du").stdout
    assert hub.edgevlm(tmp_path, *PULL).returncode == 0
    models = tmp_path / "edgevlm/models"
    shown = sorted(p.name for p in models.iterdir() if not p.name.endswith((".locks", "points")))
    assert shown == ["tiny"]
    assert hub.edgevlm(tmp_path, "models", "verify", "tiny").returncode == 0


def test_a_checkpoint_in_use_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.edgevlm(tmp_path, *PULL).returncode == 0
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "edgevlm"))
    with store.locked(store.checkpoint_key(TINY, COMMIT)):
        assert hub.edgevlm(tmp_path, "gc").stdout == ""
    assert [*(tmp_path / "hub").rglob(WEIGHTS)]
    assert TINY in hub.edgevlm(tmp_path, "gc").stdout
    assert not [*(tmp_path / "hub").rglob(WEIGHTS)]


def test_two_pulls_at_once(hub: Hub, tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "edgevlm", *PULL],
            stderr=subprocess.PIPE,
            text=True,
            env=hub.environment(tmp_path),
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert len(hub.downloads) == 1


def test_a_ready_bundle_is_taken_as_it_is(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(built_in(), repository)
    (repository / "README.md").write_text("a card", encoding="utf-8")
    with serve(pico_bundle=repository) as hub:
        pulled = hub.edgevlm(tmp_path, "pull", "org/pico-bundle", "--name", "drawn")
        assert pulled.returncode == 0
        folder = tmp_path / "edgevlm/models/drawn"
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            p.name for p in built_in().iterdir() if p.suffix in (".json", ".onnx", ".gguf")
        )
        (repository / "decoder.gguf").write_bytes(b"other")
        assert hub.edgevlm(tmp_path, "rm", "drawn").returncode == 0
        broken = hub.edgevlm(tmp_path, "pull", "org/pico-bundle", "--name", "drawn")
        assert broken.returncode == 1 and "decoder.gguf: is truncated" in broken.stderr
        assert not folder.exists()
        (repository / "decoder.gguf").unlink()
        lacking = hub.edgevlm(tmp_path, "pull", "org/pico-bundle", "--name", "drawn")
        assert "lacks decoder.gguf of its bundle" in lacking.stderr


def test_what_is_pushed_can_be_pulled(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    with serve(mine=repository) as hub:
        pushed = hub.edgevlm(tmp_path, "push", "pico", "org/mine", HF_TOKEN="hf_token")
        assert (
            pushed.returncode == 0 and pushed.stdout == f"{hub.address}/org/mine/commit/{COMMIT}\n"
        )
        card = (repository / "README.md").read_text(encoding="utf-8")
        assert "license: apache-2.0" in card and "edgevlm pull org/mine" in card
        (repository / "README.md").write_text("my own words", encoding="utf-8")
        assert hub.edgevlm(tmp_path, "push", "pico", "org/mine", HF_TOKEN="t").returncode == 0
        assert (repository / "README.md").read_text(encoding="utf-8") == "my own words"
        assert hub.edgevlm(tmp_path, "pull", "org/mine").returncode == 0
        hub.faults.append(Fault("PUT /put/", times=9, status=400))
        broken = hub.edgevlm(tmp_path, "push", "pico", "org/mine", HF_TOKEN="t")
        assert broken.returncode == 1 and "edgevlm: org/mine: the hub" in broken.stderr
        assert "Traceback" not in broken.stderr
        hub.faults[:] = [Fault("POST /api/", times=99, status=401)]
        refused = hub.edgevlm(tmp_path, "push", "pico", "org/mine")
        assert refused.returncode == 1 and "hf auth login" in refused.stderr
    assert hub.edgevlm(tmp_path, "models", "verify", "mine").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("pull", "smolvm-256m"), "perhaps smolvlm-256m"),
        (("pull", "xyzzy"), "`edgevlm models --all` lists them"),
        (("pull", ""), "no such model in the catalogue"),
        (("pull", "examples"), "`edgevlm export examples OUT` exports it"),
        (("pull", "org/name", "--name", "pico"), "cannot go by this name"),
        (("pull", "org/name", "--name", "a/b"), "cannot go by this name"),
        (("rm", "pico"), "is built in and cannot be removed"),
        (("rm", "nowhere"), "no such bundle folder"),
        (("use", "smolvlm-256m"), "`edgevlm pull smolvlm-256m` gets it"),
        (("ask", "hi", "-m", "smolvlm-500m"), "`edgevlm pull smolvlm-500m` gets it"),
        (("ask", "hi", "-m", "smolvlm-500"), "did you mean smolvlm-500m"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = Hub("http://127.0.0.1:9").edgevlm(tmp_path, *arguments)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_the_catalogue_names_families_that_there_are() -> None:
    for entry in catalogue.entries().values():
        layouts = [ROOT / "edgevlm" / kind / f"{entry.family}.py" for kind in ("families", "dual")]
        assert any(path.is_file() for path in layouts)
        assert entry.download > entry.bundle > 0 and entry.memory > entry.bundle
        assert entry.revision is None or len(entry.revision) == 40


@pytest.mark.parametrize("name", sorted({*catalogue.entries()} & {*MODELS}))
def test_the_catalogue_knows_a_bundles_size(name: str) -> None:
    _, model = make.describe(MODELS[name], name)
    projector = model.projector
    parts: list[tuple[Part, int]] = [(model.vision, 1)]
    parts.append((projector, 1 if net(projector).quantized else 4))
    parts += [(model.region_model, 4)] if model.region_model else []
    # What is no matrix stays in float32: kernels of convolutions, norms, biases.
    shapes = [(shape, size) for part, size in parts for shape in part.tensors().values()]
    graphs = sum((size if len(shape) == 2 else 4) * math.prod(shape) for shape, size in shapes)
    found = graphs + decoder_bytes(model, "q4_k_m")
    assert catalogue.entries()[name].bundle == pytest.approx(found, rel=0.01)


def test_a_model_that_is_being_changed_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    shutil.copytree(built_in(), tmp_path / "models/mine")
    code = "import sys\nfrom edgevlm import store\nstore.remove('mine')"
    with store.locked("mine"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"EDGEVLM_HOME": str(tmp_path)},
        )  # fmt: skip
        assert "BundleError: mine: is being changed by another process" in done.stderr
    assert resolve("mine") == tmp_path / "models/mine"
    assert store.remove("mine") > 0
    with pytest.raises(BundleError):
        store.remove("mine")


def test_missing_packages_are_named_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    download = "edgevlm.hub.download.snapshot"
    monkeypatch.setattr(download, lambda *_, **__: pytest.fail("downloaded"))
    weights = (RemoteFile("pytorch_model.bin", 1),)
    plan = pulling.Pull("tiny", Repository(TINY, COMMIT, weights), None, weights, False, 1)
    with pytest.raises(EngineMissing, match=r"weights are in torch's format.*edgevlm\[export\]"):
        pulling.carry_out(plan)
    with pytest.raises(EngineMissing, match=r"verification needs torch.*edgevlm\[export\]"):
        pulling.carry_out(plan, verify=True)
