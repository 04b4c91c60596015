"""Names of models and places in the home, whatever the home is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgevlm
from edgevlm import catalogue, models
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError, BundleNotFound
from edgevlm.manifest import MANIFEST


@pytest.mark.fault("Home", "EDGEVLM_HOME that is no folder", "the built-in model alone")
@pytest.mark.parametrize("home", ["file", "none", "long"])
def test_a_home_that_cannot_be_had_has_the_built_in_model_alone(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    place = {"file": tmp_path / "file", "none": "/proc/none", "long": tmp_path / ("x" * 300)}[home]
    monkeypatch.setenv("EDGEVLM_HOME", str(place))
    assert list(models.installed()) == ["pico"]
    assert models.resolve("pico") == models.resolve(None) == models.built_in()


@pytest.mark.fault(
    "Home",
    "EDGEVLM_HOME of another user",
    "the built-in model alone; others are not found, in one line",
)
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O")])
def test_a_home_of_somebody_else(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def denied(*_: object, **__: object) -> None:
        raise error

    catalogue.entries()  # which are files of the package, read once
    for name in ("iterdir", "is_dir", "exists", "stat"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert list(models.installed()) == ["pico"]
    with pytest.raises(BundleNotFound, match="there are: pico"):
        models.resolve("mine")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(BundleNotFound):
        models.resolve(name)


@pytest.mark.fault("Home", "no home folder at all", "every command works with the built-in model")
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="no /proc here")
@pytest.mark.parametrize(
    "command", [["models", "list"], ["caption", "-m", "pico", "-i", "examples/shapes.png"]]
)
def test_commands_work_and_say_nothing_of_a_home_that_is_none(command: list[str]) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("EDGEVLM_HOME", "EDGEVLM_MODEL")}
    env |= {"HOME": "/proc/none", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "edgevlm", *command],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("Bundles in ")]
    assert (done.returncode, said) == (0, [])
    assert "pico" in done.stdout or "circle" in done.stdout


@pytest.mark.parametrize("home", ["~", "~/", "~/.local/edgevlm", "~/a/../b"])
def test_a_home_that_no_shell_has_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGEVLM_HOME", home)
    expanded = tmp_path / home[1:].lstrip("/")
    assert models.directory() == expanded / "models"
    assert models.cache_directory() == expanded / "cache"


def test_a_home_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "a~b"))
    assert models.directory() == tmp_path / "a~b" / "models"


def test_a_bundle_that_is_being_written_has_no_name_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    for name in ("mine", ".edgevlm-12345678.part"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / MANIFEST).write_text("{}", encoding="utf-8")
    assert list(models.installed()) == [models.BUILT_IN, "mine"]


def test_an_empty_name_is_none() -> None:
    with pytest.raises(BundleNotFound, match="name is empty"):
        models.resolve("")
    with pytest.raises(BundleNotFound, match="name is empty"):
        edgevlm.load("")


def test_a_bundle_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    """It can be checked, which needs no engine, and not be loaded."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.symlink_to(models.built_in())
    assert open_bundle(folder, "full")
    with pytest.raises(BundleError, match="not UTF-8, and engines open no others"):
        edgevlm.load(folder)
    with pytest.raises(BundleError, match="not UTF-8"):
        edgevlm.load(os.fspath(folder))
