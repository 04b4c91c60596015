"""The optional jobs that compare another back end with the CPU: here the CPU with itself."""

import subprocess
import types
import venv
from pathlib import Path
from typing import Any

import pytest

from edgevlm.benchmarks.latency.files import default_picture
from edgevlm.errors import BenchError
from edgevlm.models import built_in
from workshop.backends import compare, environment


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    return default_picture(tmp_path)


def test_an_encoder_that_is_the_cpus_own_differs_in_nothing(picture: Path) -> None:
    row = dict(zip(compare.VISION_HEAD, compare.vision(built_in(), "cpu", picture), strict=True))
    assert (row["model"], row["runs"]) == ("pico, int8", "cpu")
    assert row["features"] == row["embeddings"] == "1.000000"
    assert row["encode"].endswith(" ms") and row["second start"].endswith(" ms")


def test_a_decoder_that_is_the_cpus_own_differs_in_nothing(picture: Path) -> None:
    row = compare.decoder(built_in(), "cpu", picture)
    assert row[1:5] == ("cpu", "0", "0", "100%")
    assert len(row) == len(compare.DECODER_HEAD)


def test_choices_name_the_words_of_what_is_offered() -> None:
    rows = compare.choices()
    assert ("cpu", "auto, cpu") in [(r[0], r[4]) for r in rows]
    assert compare.table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_what_cannot_be_installed_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(command: list[str], **options: Any) -> types.SimpleNamespace:
        asked.append((command, options))
        return types.SimpleNamespace(returncode=1, stderr="one\nerror: no glslc\n", stdout="")

    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(
        BenchError, match=r"vulkan: cannot be installed \(error: no glslc\); it needs"
    ):
        environment.python(environment.jobs()["vulkan"], tmp_path)
    command, options = asked[0]
    assert command[1:4] == ["-m", "pip", "install"] and "--no-deps" in command
    assert "-DGGML_VULKAN=on" in options["env"]["CMAKE_ARGS"]
    assert not (tmp_path / "ready").exists()


def test_a_job_runs_in_its_environment_with_its_own_packages_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ready").touch()
    ran: dict[str, Any] = {}

    def run(
        command: list[str], *, env: dict[str, str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        ran.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment.run(environment.jobs()["vulkan"], ["model"], tmp_path) == 3
    assert ran["command"][0].startswith(str(tmp_path)) and ran["command"][-2:] == [
        "--here",
        "model",
    ]
    assert "PYTHONPATH" not in ran["env"] and ran["env"]["GGML_VK_VISIBLE_DEVICES"] == "0"
