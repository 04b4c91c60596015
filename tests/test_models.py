"""Names of models and places in the home, whatever the home is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm import models
from edgevlm.errors import BundleNotFound


@pytest.mark.parametrize("home", ["file", "none", "long"])
def test_a_home_that_cannot_be_had_has_the_built_in_model_alone(home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    place = {"file": tmp_path / "file", "none": "/proc/none", "long": tmp_path / ("x" * 300)}[home]
    monkeypatch.setenv("EDGEVLM_HOME", str(place))
    assert list(models.installed()) == ["pico"]
    assert models.resolve("pico") == models.resolve(None) == models.built_in()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O")])
def test_a_home_of_somebody_else(monkeypatch, error):
    def denied(*_: object, **__: object) -> None:
        raise error

    for name in ("iterdir", "is_dir", "exists", "stat"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert list(models.installed()) == ["pico"]
    with pytest.raises(BundleNotFound, match="there are: pico"):
        models.resolve("mine")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(BundleNotFound):
        models.resolve(name)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="no /proc here")
@pytest.mark.parametrize(
    "command", [["models", "list"], ["caption", "-m", "pico", "-i", "examples/shapes.png"]]
)
def test_commands_work_and_say_nothing_of_a_home_that_is_none(command):
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
