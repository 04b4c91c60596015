"""Models on the hub, played by a small server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.hub import locate
from edgevlm.types import Progress
from tests.hub import COMMIT, Hub, serve

REPO = "org/tiny-paligemma"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (f"models--org--tiny-paligemma/snapshots/{COMMIT}", "tiny-paligemma"),
        (f"models--gpt2/snapshots/{'abc4' * 10}", "gpt2"),
        (f"other/snapshots/{COMMIT}/", "other"),
        (f"org/{COMMIT}", COMMIT),
        ("models--org--name/snapshots/mine", "mine"),
    ],
)
def test_a_folder_of_the_hubs_cache_has_the_models_name(
    tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert locate(tmp_path / folder) == (tmp_path / folder, name)
    (tmp_path / "link").symlink_to(folder)
    assert locate(tmp_path / "link")[1] == name


def test_a_source_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(SourceError, match="not UTF-8"):
        locate(folder)


@pytest.fixture
def hub(paligemma_checkpoint: Path) -> Iterator[Hub]:
    with serve(tiny_paligemma=paligemma_checkpoint) as served:
        yield served


def located(source: str, hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """Says where a source was downloaded to, its name, and how many bytes that were."""

    def action() -> None:
        steps: list[Progress] = []
        try:
            print(*locate(source, steps.append), steps[-1].done, sep="\n")
        except SourceError as e:
            sys.exit(f"SourceError: {e}")

    return hub.run(action, home)


def test_a_model_is_downloaded(hub: Hub, paligemma_checkpoint: Path, tmp_path: Path) -> None:
    (paligemma_checkpoint / "pytorch_model.bin").write_bytes(b"not wanted")
    done = located(f"{REPO}@main", hub, tmp_path)
    (paligemma_checkpoint / "pytorch_model.bin").unlink()
    assert done.returncode == 0 and done.stderr == ""
    folder, name, n_bytes = done.stdout.splitlines()
    assert int(n_bytes) == sum(p.stat().st_size for p in Path(folder).iterdir())
    assert name == "tiny-paligemma"
    for wanted in ("config.json", "model.safetensors", "tokenizer.model"):
        expected = (paligemma_checkpoint / wanted).read_bytes()
        assert (Path(folder) / wanted).read_bytes() == expected
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_torchs_files_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("config.json", *shards, "training_args.bin"):
        (repository / name).write_bytes(name.encode())
    with serve(tiny_paligemma=repository) as hub:
        done = located(REPO, hub, tmp_path / "home")
    assert done.returncode == 0 and done.stderr == ""
    folder = Path(done.stdout.splitlines()[0])
    assert sorted(p.name for p in folder.glob("*.bin")) == shards
    assert (folder / shards[1]).read_bytes() == shards[1].encode()
    assert (folder / "config.json").is_file()
    assert not any("training_args" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("org/unknown", "is neither a folder here nor a model on the hub"),
        ("org/gated", "access is restricted; accept its licence"),
        ("org/broken", "the hub cannot be reached"),
        (f"{REPO}@nowhere", "has no such revision"),
        ("org/--bad..name", "is not a valid name on the hub"),
    ],
)
def test_models_that_cannot_be_had(hub: Hub, tmp_path: Path, source: str, says: str) -> None:
    done = located(source, hub, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"SourceError: {source}: ") and says in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_network(tmp_path: Path) -> None:
    done = located(REPO, Hub("http://127.0.0.1:9"), tmp_path)
    assert "SourceError: org/tiny-paligemma: the hub cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.fault("Home", "a download cache that cannot be written", "one line with the cure")
@pytest.mark.parametrize("home", ["file", "none"])
def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, home: str) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    place = tmp_path / "file" if home == "file" else Path("/proc/none")
    if not place.parent.is_dir():
        pytest.skip("no /proc here")
    done = located(REPO, hub, place)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"SourceError: {REPO}: cannot be kept on this disk (")
    assert str(place) in done.stderr and done.stderr.endswith("HF_HOME names another folder\n")


@pytest.mark.parametrize("source", ["./org/name", "nowhere", "a/b/c", "../x/y"])
def test_what_looks_like_a_folder_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        locate(source)
